// bf16 tiles, for CPUs whose dot products take them: products run at about twice the rate of fp32, and scores are as exact,
// since they are summed in fp32. Only G is rounded, once, as any bf16 kernel does.
//
// The right factor of such a product lies in pairs: the elements (2p, c) and (2p + 1, c) side by side in 32 bits. A matrix in
// pairs is moved and transposed as one of 32-bit elements.
#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include "operand.h"

namespace fastkd {
namespace {

using BFloat16 = c10::BFloat16;

// to (16 pairs) = the 16 elements at `even` and at `odd`, side by side.
inline void interleave(__m256i even, __m256i odd, BFloat16* to) {
  const __m512i low = _mm512_cvtepu16_epi32(even), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(low, high));
}

inline __m256i load16(const BFloat16* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// A row of a head is too short for the call that std::memcpy is.
inline void copy(const BFloat16* from, int64_t width, BFloat16* to) {
  int64_t c = 0;
  for (; c + 16 <= width; c += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), load16(from + c));
  }
  std::memcpy(to + c, from + c, (width - c) * sizeof(BFloat16));
}

template <>
struct Packing<BFloat16> {
  explicit Packing(int64_t width)
      : ld(padded(width)), left_ld((width + 31) / 32 * 32), depth((width + 1) / 2 * 2) {}

  int64_t floats(bool gradient) const {
    return kTile * (left_ld + (gradient ? ld : 0));
  }

  void pack(const Tokens& tokens, int64_t begin, float* tile, bool gradient) const {
    auto* left = reinterpret_cast<BFloat16*>(tile);
    const int64_t count = std::min(kTile, tokens.count - begin);
    const int64_t rows = (count + 31) / 32 * 32; // both sides of a transpose in pairs are multiples of 16 pairs
    for (int64_t i = 0; i < count; ++i) {
      copy(reinterpret_cast<const BFloat16*>(tokens.at(begin + i)), tokens.width, left + i * left_ld);
      std::fill(left + i * left_ld + tokens.width, left + (i + 1) * left_ld, BFloat16(0.f));
    }
    std::fill(left + count * left_ld, left + rows * left_ld, BFloat16(0.f));
    transpose(rows, left_ld / 2, tile, left_ld / 2, tile + kTile * left_ld / 2, kTile);
    if (gradient) {
      float* pairs = tile + kTile * left_ld;
      for (int64_t row = 0; row < rows; row += 2) {
        for (int64_t c = 0; c < ld; c += 16) {
          interleave(load16(left + row * left_ld + c), load16(left + (row + 1) * left_ld + c),
                     reinterpret_cast<BFloat16*>(pairs + row / 2 * ld + c));
        }
      }
      transpose(rows / 2, ld, pairs, ld, pairs + kTile / 2 * ld, kTile / 2);
    }
  }

  const BFloat16* left(const float* tile, int64_t row) const {
    return reinterpret_cast<const BFloat16*>(tile) + row * left_ld;
  }

  const BFloat16* right(const float* tile, int64_t column) const { // in pairs
    return reinterpret_cast<const BFloat16*>(tile + kTile * left_ld / 2 + column);
  }

  const BFloat16* row_factor(const float* tile) const { // in pairs
    return reinterpret_cast<const BFloat16*>(tile + kTile * left_ld);
  }

  const BFloat16* column_factor(const float* tile) const {
    return reinterpret_cast<const BFloat16*>(tile + kTile * left_ld + kTile / 2 * ld);
  }

  const int64_t ld; // the width, rounded up to a multiple of 16
  const int64_t left_ld;
  const int64_t depth;
};

template <>
struct Gradient<BFloat16> {
  explicit Gradient(Arena& arena)
      : rows(reinterpret_cast<BFloat16*>(arena.take(kArea / 2))),
        columns(reinterpret_cast<BFloat16*>(arena.take(kArea / 2))) {}

  void begin(float* /*in_place*/) {}

  void store(int64_t row, int64_t column, const Vec& even_row, const Vec& odd_row, bool in_columns = true) const {
    const auto even = (__m256i)_mm512_cvtneps_pbh(even_row), odd = (__m256i)_mm512_cvtneps_pbh(odd_row);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + row * kTile + column), even);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + (row + 1) * kTile + column), odd);
    if (in_columns) {
      interleave(even, odd, columns + row * kTile + 2 * column);
    }
  }

  void pack(int64_t m, int64_t n, const float* g, bool in_columns) const {
    for (int64_t row = 0; row < m; row += 2) {
      for (int64_t c = 0; c < n; c += Vec::size()) {
        store(row, c, Vec::loadu(g + row * kTile + c), Vec::loadu(g + (row + 1) * kTile + c), in_columns);
      }
    }
  }

  BFloat16* rows; // for the row gradient
  BFloat16* columns; // for the column gradient, in pairs
};

} // namespace
} // namespace fastkd

#endif
