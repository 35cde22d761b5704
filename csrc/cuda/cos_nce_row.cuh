// How a warp holds a row: kColumns numbers per lane, in runs of kRun neighbours. A run is 16 bytes of memory, or, of rows
// that are not made of aligned runs of one type, a single number. Included behind warp.cuh or its namesake for the CPU.
#pragma once

#include <cstdint>

namespace fastkd::cosine {

enum class Type { kFp32, kBf16, kFp16, kAny }; // kAny: known at run time, and read number by number

__host__ __device__ constexpr int bytes_of(Type type) { return type == Type::kFp32 ? 4 : 2; }
__host__ __device__ constexpr int run_of(Type type) { return type == Type::kAny ? 1 : 16 / bytes_of(type); }

// A tensor (layers, samples, positions, width); strides count elements, and the last is one.
struct Vectors {
  const void* data;
  int64_t layer, sample, position;
  Type type;
  bool in_runs; // every row is made of runs, and the first begins at a multiple of 16 bytes

  __device__ const char* row(int64_t i_layer, int64_t i_sample, int64_t i_position) const {
    const int64_t at = i_layer * layer + i_sample * sample + i_position * position;
    return static_cast<const char*>(data) + at * bytes_of(type);
  }
};

// Where there is a vector: everywhere, without data.
struct Mask {
  const uint8_t* data;
  int64_t sample, position;

  __device__ bool holds(int64_t i_sample, int64_t i_position) const {
    return data == nullptr || data[i_sample * sample + i_position * position] != 0;
  }
};

__device__ inline uint32_t load_bits(const char* row, int64_t column, Type type) {
  return type == Type::kFp32 ? reinterpret_cast<const uint32_t*>(row)[column]
                             : reinterpret_cast<const uint16_t*>(row)[column];
}

__device__ inline float widen(uint32_t bits, Type type) {
  return type == Type::kFp32 ? float_of(bits) : type == Type::kBf16 ? widen_bf16(bits) : widen_fp16(bits);
}

__device__ inline void store_one(char* row, int64_t column, Type type, float value) {
  if (type == Type::kFp32) {
    reinterpret_cast<float*>(row)[column] = value;
  } else {
    const uint32_t bits = type == Type::kBf16 ? pack_bf16(value, 0.f) : pack_fp16(value, 0.f);
    reinterpret_cast<uint16_t*>(row)[column] = static_cast<uint16_t>(bits);
  }
}

// The numbers of one lane as they lie in memory: converted late, so that many loads are under way.
template <Type kType, int kColumns>
struct Packed {
  static constexpr int kRun = run_of(kType), kRuns = kColumns / kRun;
  static constexpr int kWords = kType == Type::kAny ? 1 : 4; // of a run

  uint32_t words[kRuns][kWords];

  static __device__ int64_t column(int run) { return (run * 32 + thread() % 32) * kRun; }

  // Zero behind the width.
  __device__ void load(const char* row, int64_t first, int64_t width, Type any) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t at = first + column(run);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[run][i] = 0;
      }
      if (at < width) {
        if constexpr (kType == Type::kAny) {
          words[run][0] = load_bits(row, at, any);
        } else {
          load_16(words[run], row + at * bytes_of(kType));
        }
      }
    }
  }

  __device__ void widened(float (&out)[kColumns], Type any) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if constexpr (kType == Type::kAny) {
        out[i] = widen(words[i][0], any);
      } else if constexpr (kType == Type::kFp32) {
        out[i] = float_of(words[i / 4][i % 4]);
      } else {
        out[i] = widen(words[i / 8][i % 8 / 2] >> (i % 2 * 16) & 0xffffu, kType);
      }
    }
  }

  // One run of a row that begins at a multiple of 16 bytes unless kRun is one.
  static __device__ void store(char* row, int64_t at, int64_t width, Type any, const float (&values)[kRun]) {
    if (at >= width) {
      return;
    }
    if constexpr (kType == Type::kAny) {
      store_one(row, at, any, values[0]);
    } else {
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kType == Type::kFp32) {
          out[i] = bits_of(values[i]);
        } else {
          const float low = values[2 * i], high = values[2 * i + 1];
          out[i] = kType == Type::kBf16 ? pack_bf16(low, high) : pack_fp16(low, high);
        }
      }
      store_16(row + at * bytes_of(kType), out);
    }
  }
};

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    value += shuffle_xor(value, mask);
  }
  return value;
}

// Zero where the vector counts as zero. A square that is infinite must not end as the inverse 0.
__device__ inline float inverse_norm(float squares) {
  return squares <= 1e-16f ? 0.f : 1.f / sqrtf(squares) + 0.f * squares;
}

} // namespace fastkd::cosine
