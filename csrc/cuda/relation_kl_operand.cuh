// The tokens of one (sequence, head), and how they come into shared memory: rows of `depth` 16-bit elements, zero where
// there is no token and outside the head. Whoever includes this includes warp.cuh, or what stands in for it, first.
#pragma once

#include <cstdint>

namespace fastkd {

enum class Type : int { kBf16, kFp16, kFp32 };

// One of the schema's tensors. Strides count elements.
struct Operand {
  const void* data;
  int64_t row_stride;
  int64_t sequence_stride; // 0 for packed tensors
  int width; // of one head
  int depth; // elements of a row in shared memory: a multiple of 16
  int chunk_bits; // log2 of the chunks of 8 elements that a row has, rounded up
  Type type;
  // All rows of a head begin at the same distance from a 16-byte boundary: they keep it in shared memory, so that chunks
  // are copied whole. Else rows begin at the beginning.
  bool aligned;
};

struct Batch {
  const int64_t* starts;
  const int32_t* lengths;
  const int32_t* order; // or null
  int64_t order_stride;
  const int32_t* ranked; // sequences, longest first
  int64_t sequences;
  int max_length;
  int heads;
  bool packed;
};

struct Place {
  int64_t sequence;
  int64_t start;
  int head;
  int length;
};

__device__ inline Place place_of(const Batch& batch, int64_t rank, int head) {
  const int64_t sequence = batch.ranked[rank];
  const int length = batch.lengths[sequence];
  return {sequence, batch.starts[sequence], head, length < batch.max_length ? length : batch.max_length};
}

// The row at which a token stands, counted from where the sequence begins.
__device__ inline int64_t row_of(const Batch& batch, const Place& place, int token) {
  return batch.order ? batch.order[place.sequence * batch.order_stride + token] : token;
}

// The element at which a head of a token begins.
__device__ inline int64_t offset_of(const Batch& batch, const Place& place, int token, int64_t row_stride,
                                    int64_t sequence_stride, int width) {
  return place.sequence * sequence_stride + (place.start + row_of(batch, place, token)) * row_stride +
         static_cast<int64_t>(place.head) * width;
}

// How many elements after a 16-byte boundary the rows of a head begin.
__device__ inline int shift_of(const Operand& x, const Place& place) {
  if (!x.aligned) {
    return 0;
  }
  const auto* head = static_cast<const uint16_t*>(x.data) + static_cast<int64_t>(place.head) * x.width;
  return static_cast<int>(reinterpret_cast<uintptr_t>(head) % 16 / 2);
}

// Rows in shared memory lie an odd number of 16-byte units apart: ldmatrix meets no bank twice.
__host__ __device__ constexpr int pitch_of(int depth) { return 2 * depth + 16; }

struct alignas(16) Chunk {
  uint32_t words[4];
};

__device__ inline float load_element(const void* data, int64_t index, Type type) {
  if (type == Type::kFp32) {
    return static_cast<const float*>(data)[index];
  }
  const uint32_t bits = static_cast<const uint16_t*>(data)[index];
  return type == Type::kBf16 ? widen_bf16(bits) : widen_fp16(bits);
}

__device__ inline void store_element(void* data, int64_t index, float value, Type type) {
  if (type == Type::kFp32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        static_cast<uint16_t>(type == Type::kBf16 ? pack_bf16(value, 0.f) : pack_fp16(value, 0.f));
  }
}

// Tokens first to first + count of a head to `to`, the planes of Precision one after the other. Copies may still be on
// their way afterwards. `exact` keeps the channels of neighbouring heads out; without it they may come along (only what
// lies in the same row), for an operand whose products with zeros alone meet them.
template <class Precision>
__device__ void load_rows(char* to, const Operand& x, const Batch& batch, const Place& place, int first, int count,
                          bool exact) {
  const int pitch = pitch_of(x.depth), shift = shift_of(x, place), chunks = x.depth / 8;
  for (int i = thread(); i < count << x.chunk_bits; i += threads()) {
    const int row = i >> x.chunk_bits, chunk = i & ((1 << x.chunk_bits) - 1), token = first + row;
    if (chunk >= chunks) {
      continue;
    }
    char* target = to + row * pitch + chunk * 16;
    const int begin = chunk * 8 - shift; // of the chunk, within the head
    if (token >= place.length || begin >= x.width) {
      for (int plane = 0; plane < Precision::kPlanes; ++plane) {
        *reinterpret_cast<Chunk*>(target + plane * count * pitch) = Chunk{};
      }
      continue;
    }
    const int64_t offset = offset_of(batch, place, token, x.row_stride, x.sequence_stride, x.width);
    if constexpr (Precision::kPlanes == 1) {
      const int left = exact ? 0 : -place.head * x.width, right = exact ? x.width : left + batch.heads * x.width;
      const uint16_t* source = static_cast<const uint16_t*>(x.data) + offset + begin;
      if (x.aligned && begin >= left && begin + 8 <= right) {
        copy_16(target, source);
        continue;
      }
      Chunk whole;
      for (int pair = 0; pair < 4; ++pair) {
        const int at = begin + 2 * pair;
        const uint32_t low = at >= 0 && at < x.width ? source[2 * pair] : 0;
        const uint32_t high = at + 1 >= 0 && at + 1 < x.width ? source[2 * pair + 1] : 0;
        whole.words[pair] = low | high << 16;
      }
      *reinterpret_cast<Chunk*>(target) = whole;
    } else {
      Chunk planes[Precision::kPlanes];
      for (int pair = 0; pair < 4; ++pair) {
        const int at = begin + 2 * pair;
        const float low = at < x.width ? load_element(x.data, offset + at, x.type) : 0.f;
        const float high = at + 1 < x.width ? load_element(x.data, offset + at + 1, x.type) : 0.f;
        uint32_t parts[Precision::kPlanes];
        Precision::split(low, high, parts);
        for (int plane = 0; plane < Precision::kPlanes; ++plane) {
          planes[plane].words[pair] = parts[plane];
        }
      }
      for (int plane = 0; plane < Precision::kPlanes; ++plane) {
        *reinterpret_cast<Chunk*>(target + plane * count * pitch) = planes[plane];
      }
    }
  }
}

} // namespace fastkd
