// Numbers as they are stored, and a few neighbouring ones of them at a time, as fp32. A chunk is what a lane takes of a
// row at once: 16 bytes of it, or one number where width or addresses do not allow more.
#pragma once

#include <cstdint>

namespace fastkd::sparse {

enum class Type : int { kFp32, kFp16, kBf16, kInt8 };

__device__ __host__ constexpr int bytes_of(Type type) { return type == Type::kFp32 ? 4 : type == Type::kInt8 ? 1 : 2; }

// Number i of those that begin in words.
template <Type kType>
__device__ inline float number(const uint32_t* words, int i) {
  if constexpr (kType == Type::kFp32) {
    return float_of(words[i]);
  } else if constexpr (kType == Type::kInt8) {
    return static_cast<float>(static_cast<int8_t>(words[i / 4] >> (i % 4 * 8) & 0xffu));
  } else {
    const uint32_t bits = words[i / 2] >> (i % 2 * 16) & 0xffffu;
    return kType == Type::kFp16 ? widen_fp16(bits) : widen_bf16(bits);
  }
}

__device__ inline uint32_t load_bits(const void* from, int bytes) {
  return bytes == 4   ? *static_cast<const uint32_t*>(from)
         : bytes == 2 ? *static_cast<const uint16_t*>(from)
                      : *static_cast<const uint8_t*>(from);
}

__device__ inline float decoded(uint32_t bits, Type type) {
  return type == Type::kFp32   ? number<Type::kFp32>(&bits, 0)
         : type == Type::kFp16 ? number<Type::kFp16>(&bits, 0)
         : type == Type::kBf16 ? number<Type::kBf16>(&bits, 0)
                               : number<Type::kInt8>(&bits, 0);
}

__device__ inline float load_number(const void* table, int64_t at, Type type) {
  return decoded(load_bits(static_cast<const char*>(table) + at * bytes_of(type), bytes_of(type)), type);
}

// How kept rows are read: kColumns numbers of one type by loads of 16 bytes (or of 8), not converted before they are used,
// so that many rows can be on the way.
template <Type kType, int kColumns_>
struct Packed {
  static constexpr int kColumns = kColumns_, kBytes = kColumns * bytes_of(kType), kWords = kBytes / 4;
  static_assert(kBytes == 8 || kBytes % 16 == 0);

  __device__ explicit Packed(Type) {}

  __device__ void load(uint32_t (&words)[kWords], const void* table, int64_t at) const {
    const char* from = static_cast<const char*>(table) + at * bytes_of(kType);
    if constexpr (kBytes == 8) {
      load_8(words, from);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        load_16(reinterpret_cast<uint32_t(&)[4]>(words[4 * i]), from + 16 * i);
      }
    }
  }

  __device__ float value(const uint32_t (&words)[kWords], int i) const { return number<kType>(words, i); }
};

// The same, one number of any type.
struct Single {
  static constexpr int kColumns = 1, kWords = 1;
  Type type;

  __device__ explicit Single(Type type) : type(type) {}

  __device__ void load(uint32_t (&words)[1], const void* table, int64_t at) const {
    words[0] = load_bits(static_cast<const char*>(table) + at * bytes_of(type), bytes_of(type));
  }

  __device__ float value(const uint32_t (&words)[1], int) const { return decoded(words[0], type); }
};

// kColumns numbers of a type that is known when the kernel runs.
template <int kColumns, Type kType>
__device__ inline void load_as(float (&out)[kColumns], const void* table, int64_t at) {
  const Packed<kType, kColumns> packed(kType);
  uint32_t words[Packed<kType, kColumns>::kWords];
  packed.load(words, table, at);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    out[i] = packed.value(words, i);
  }
}

template <int kColumns>
__device__ inline void load_chunk(float (&out)[kColumns], const void* table, int64_t at, Type type) {
  if constexpr (kColumns == 1) {
    out[0] = load_number(table, at, type);
  } else if (type == Type::kFp32) {
    load_as<kColumns, Type::kFp32>(out, table, at);
  } else if (type == Type::kFp16) {
    load_as<kColumns, Type::kFp16>(out, table, at);
  } else {
    load_as<kColumns, Type::kBf16>(out, table, at);
  }
}

// Words to memory, in the largest stores that there are.
template <int kWords>
__device__ inline void store_words(char* to, const uint32_t (&words)[kWords]) {
  if constexpr (kWords == 2) {
    store_8(to, words);
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      store_16(to + 16 * i, reinterpret_cast<const uint32_t(&)[4]>(words[4 * i]));
    }
  }
}

template <int kColumns>
__device__ inline void store_chunk(void* table, int64_t at, Type type, const float (&values)[kColumns]) {
  char* to = static_cast<char*>(table) + at * bytes_of(type);
  if constexpr (kColumns == 1) {
    if (type == Type::kFp32) {
      *reinterpret_cast<float*>(to) = values[0];
    } else {
      const uint32_t bits = type == Type::kFp16 ? pack_fp16(values[0], 0.f) : pack_bf16(values[0], 0.f);
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
    }
  } else if (type == Type::kFp32) {
    uint32_t words[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      words[i] = bits_of(values[i]);
    }
    store_words(to, words);
  } else {
    uint32_t words[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const float low = values[2 * i], high = values[2 * i + 1];
      words[i] = type == Type::kFp16 ? pack_fp16(low, high) : pack_bf16(low, high);
    }
    store_words(to, words);
  }
}

} // namespace fastkd::sparse
