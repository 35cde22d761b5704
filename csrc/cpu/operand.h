// The operands of one relation head: where the tokens of a sequence lie, and their fp32 tiles.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "tiles.h"

namespace fastkd {
namespace {

// One head's `width` channels of the valid tokens of one sequence, in a tensor of fp32, bf16 or fp16.
struct Tokens {
  char* first = nullptr; // the channels at position 0 of the sequence
  int64_t stride = 0; // bytes from one position to the next
  c10::ScalarType dtype = c10::ScalarType::Float;
  const int32_t* order = nullptr; // the positions of the valid tokens; nullptr where they are 0, 1, 2, ...
  int64_t count = 0;
  int64_t width = 0;
  int64_t bytes = 0; // of the channels

  char* at(int64_t token) const {
    return first + (order ? order[token] : token) * stride;
  }
};

template <typename Function>
void with_type(c10::ScalarType dtype, Function function) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return function(float());
    case c10::ScalarType::BFloat16:
      return function(c10::BFloat16());
    case c10::ScalarType::Half:
      return function(c10::Half());
    default:
      throw std::invalid_argument("relation_kl_cpp takes float32, bfloat16 and float16");
  }
}

// Asks for a token that will be loaded, or stored, soon: the rows of a head lie far apart, where the hardware does not
// look ahead.
template <bool kForStore>
void prefetch(const Tokens& tokens, int64_t token) {
  if (token < tokens.count) {
    const char* row = tokens.at(token);
    for (int64_t offset = 0; offset < tokens.bytes; offset += 64) {
      __builtin_prefetch(row + offset, kForStore, /*locality*/ 2);
      asm volatile("" ::"r"(row)); // GCC takes a loop that does nothing else for an empty one
    }
  }
}

// rows (up to 64 tokens from `begin`, leading dimension `ld`) = the tokens in fp32, zero up to a multiple of 16 both ways.
inline void load_rows(const Tokens& tokens, int64_t begin, float* rows, int64_t ld) {
  const int64_t count = std::min(kTile, tokens.count - begin);
  with_type(tokens.dtype, [&](auto type) {
    for (int64_t i = 0; i < count; ++i) {
      at::vec::convert(reinterpret_cast<const decltype(type)*>(tokens.at(begin + i)), rows + i * ld, tokens.width);
      std::fill(rows + i * ld + tokens.width, rows + i * ld + ld, 0.f);
    }
  });
  std::fill(rows + count * ld, rows + padded(count) * ld, 0.f);
}

// The reverse: writes up to 64 rows to the tokens from `begin` on, in their dtype.
inline void store_rows(const float* rows, int64_t ld, const Tokens& tokens, int64_t begin) {
  const int64_t count = std::min(kTile, tokens.count - begin);
  with_type(tokens.dtype, [&](auto type) {
    for (int64_t i = 0; i < count; ++i) {
      at::vec::convert(rows + i * ld, reinterpret_cast<decltype(type)*>(tokens.at(begin + i)), tokens.width);
    }
  });
}

// How the tokens of one tile lie in scratch, for the products they take part in, with elements of type Element:
//
//     scores             left · right            left (tokens × depth), right (depth × tokens)
//     row gradient       G · row_factor          (tokens × ld)
//     column gradient    column_factor · G       (ld × tokens), the transposed gradient
template <typename Element>
struct Packing;

// fp32: the rows as they come, and their transpose.
template <>
struct Packing<float> {
  explicit Packing(int64_t width) : ld(padded(width)), left_ld(ld), depth(width) {}

  int64_t floats(bool /*gradient*/) const {
    return 2 * kTile * ld;
  }

  void pack(const Tokens& tokens, int64_t begin, float* tile, bool /*gradient*/) const {
    load_rows(tokens, begin, tile, ld);
    transpose(padded(std::min(kTile, tokens.count - begin)), ld, tile, ld, tile + kTile * ld, kTile);
  }

  const float* left(const float* tile, int64_t row) const {
    return tile + row * ld;
  }

  const float* right(const float* tile, int64_t column) const {
    return tile + kTile * ld + column;
  }

  const float* row_factor(const float* tile) const {
    return tile;
  }

  const float* column_factor(const float* tile) const {
    return tile + kTile * ld;
  }

  const int64_t ld; // the width, rounded up to a multiple of 16
  const int64_t left_ld;
  const int64_t depth;
};

// A tile of G as its products take it: written two rows at a time, or packed from fp32.
template <typename Element>
struct Gradient;

template <>
struct Gradient<float> {
  explicit Gradient(Arena& /*arena*/) {}

  void begin(float* in_place) {
    columns = rows = in_place;
  }

  void store(int64_t row, int64_t column, const Vec& even, const Vec& odd) const {
    even.store(rows + row * kTile + column);
    odd.store(rows + (row + 1) * kTile + column);
  }

  void pack(int64_t /*m*/, int64_t /*n*/, float* g, bool /*columns*/) {
    begin(g);
  }

  float* rows = nullptr; // for the row gradient
  const float* columns = nullptr; // for the column gradient
};

// Tiles of 64 tokens, packed when they are first asked for. `slots` tiles are kept; with fewer slots than tiles, tile j
// takes the place of tile j - slots. `gradient`: whether the factors of the gradients will be asked for.
template <typename Element>
class Operand {
 public:
  Operand(Arena& arena, int64_t width, int64_t slots, bool gradient)
      : packing_(width),
        slots_(slots),
        gradient_(gradient),
        tiles_(arena.take(slots * packing_.floats(gradient))),
        packed_(slots),
        ld(packing_.ld),
        left_ld(packing_.left_ld),
        depth(packing_.depth) {}

  void bind(const Tokens& tokens) {
    tokens_ = tokens;
    std::fill(packed_.begin(), packed_.end(), -1);
  }

  const Element* left(int64_t tile, int64_t row = 0) {
    return packing_.left(packed(tile), row);
  }

  const Element* right(int64_t tile, int64_t column = 0) {
    return packing_.right(packed(tile), column);
  }

  const Element* row_factor(int64_t tile) {
    return packing_.row_factor(packed(tile));
  }

  const Element* column_factor(int64_t tile) {
    return packing_.column_factor(packed(tile));
  }

 private:
  const float* packed(int64_t tile) {
    float* memory = tiles_ + tile % slots_ * packing_.floats(gradient_);
    if (packed_[tile % slots_] != tile) {
      packed_[tile % slots_] = tile;
      packing_.pack(tokens_, tile * kTile, memory, gradient_);
    }
    return memory;
  }

  const Packing<Element> packing_;
  const int64_t slots_;
  const bool gradient_;
  float* tiles_;
  std::vector<int64_t> packed_; // which tile each slot holds
  Tokens tokens_;

 public:
  const int64_t ld, left_ld, depth;
};

} // namespace
} // namespace fastkd
