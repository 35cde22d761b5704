// The lookup, and the embedding block of a BERT encoder. A warp takes a token, or a slice of one where tokens are too few
// to fill the device.
#pragma once

#include "sparse_embedding_row.cuh"

namespace fastkd::sparse {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kBlocksAtOnce = 4; // at least, on a processor: what registers allow without spills

__device__ inline int64_t first_item() { return block() * kWarps + thread() / 32; }
__device__ inline int64_t item_step() { return blocks() * kWarps; }

struct Lookup {
  Code code;
  Integers ids;
  int64_t count;
  int slices; // warps per token
  void* out;
  Type out_type;
};

template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) lookup(Lookup call) {
  for (int64_t item = first_item(); item < call.count * call.slices; item += item_step()) {
    const int64_t token = item / call.slices;
    const int slice = static_cast<int>(item % call.slices);
    const auto write = [&](int chunk, const float (&values)[Format::kColumns]) {
      store_chunk(call.out, token * call.code.width + chunk * Format::kColumns, call.out_type, values);
    };
    for_each_chunk<Format>(call.code, call.ids[token], 32 * slice, 32 * call.slices, write);
  }
}

struct BlockCall {
  Lookup lookup; // one slice
  Integers type_ids, position_ids; // data is nullptr where there are none
  int64_t length, position_rows, type_rows;
  Numbers positions, types, norm_weight, norm_bias; // all of one type
  float eps;
};

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    value += shuffle_xor(value, mask);
  }
  return value;
}

// The row waits in shared memory between the sums of the LayerNorm. A lane reads there what it wrote itself, so that
// nobody waits for anybody.
template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) embedding_block(BlockCall call) {
  constexpr int kColumns = Format::kColumns;
  const Code& code = call.lookup.code;
  const int lane = thread() % 32, chunks = code.width / kColumns, rounds = (chunks + 31) / 32;
  float* row = reinterpret_cast<float*>(shared_memory()) + thread() / 32 * rounds * 32 * kColumns;
  const auto own = [&](int chunk, int i) -> float& { return row[(chunk / 32 * kColumns + i) * 32 + lane]; };
  for (int64_t token = first_item(); token < call.lookup.count; token += item_step()) {
    const int64_t position = checked(call.position_ids.data ? call.position_ids[token] : token % call.length,
                                     call.position_rows, "embedding_block: a position id is out of range");
    const int64_t type = call.types.data ? checked(call.type_ids.data ? call.type_ids[token] : 0, call.type_rows,
                                                   "embedding_block: a token type id is out of range")
                                         : 0;
    float sum = 0.f;
    for_each_chunk<Format>(code, call.lookup.ids[token], 0, 32, [&](int chunk, float (&values)[kColumns]) {
      const auto add_row = [&](const Numbers& table, int64_t at) {
        float added[kColumns];
        load_chunk(added, table.data, at * code.width + chunk * kColumns, table.type);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          values[i] += added[i];
        }
      };
      add_row(call.positions, position);
      if (call.types.data) {
        add_row(call.types, type);
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        sum += values[i];
        own(chunk, i) = values[i];
      }
    });
    const float mean = warp_sum(sum) / code.width;
    float squares = 0.f;
    for (int chunk = lane; chunk < chunks; chunk += 32) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const float centred = own(chunk, i) - mean;
        squares = fmaf(centred, centred, squares);
      }
    }
    const float factor = 1.f / sqrtf(warp_sum(squares) / code.width + call.eps);
    for (int chunk = lane; chunk < chunks; chunk += 32) {
      float weight[kColumns], values[kColumns];
      load_chunk(weight, call.norm_weight.data, chunk * kColumns, call.norm_weight.type);
      load_chunk(values, call.norm_bias.data, chunk * kColumns, call.norm_bias.type);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        values[i] = fmaf((own(chunk, i) - mean) * factor, weight[i], values[i]);
      }
      store_chunk(call.lookup.out, token * code.width + chunk * kColumns, call.lookup.out_type, values);
    }
  }
}

} // namespace fastkd::sparse
