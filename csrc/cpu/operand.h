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
    const int64_t bytes = tokens.width * static_cast<int64_t>(c10::elementSize(tokens.dtype));
    for (int64_t offset = 0; offset < bytes; offset += 64) {
      __builtin_prefetch(row + offset, kForStore, /*locality*/ 2);
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

// Tiles of 64 tokens, packed when they are first asked for: `rows` is 64 × ld, `columns` its transpose, ld × 64.
// `slots` tiles are kept; with fewer slots than tiles, tile j takes the place of tile j - slots.
class Operand {
 public:
  Operand(Arena& arena, int64_t width, int64_t slots)
      : ld(padded(width)), slots_(slots), tiles_(arena.take(slots * size_of_tile())), packed_(slots) {}

  void bind(const Tokens& tokens) {
    tokens_ = tokens;
    std::fill(packed_.begin(), packed_.end(), -1);
  }

  const float* rows(int64_t tile) {
    float* rows = tiles_ + tile % slots_ * size_of_tile();
    if (packed_[tile % slots_] != tile) {
      packed_[tile % slots_] = tile;
      load_rows(tokens_, tile * kTile, rows, ld);
      transpose(padded(std::min(kTile, tokens_.count - tile * kTile)), ld, rows, ld, rows + kTile * ld, kTile);
    }
    return rows;
  }

  const float* columns(int64_t tile) {
    return rows(tile) + kTile * ld;
  }

  const int64_t ld; // the width, rounded up to a multiple of 16

 private:
  int64_t size_of_tile() const {
    return 2 * kTile * ld;
  }

  int64_t slots_;
  float* tiles_;
  std::vector<int64_t> packed_; // which tile each slot holds
  Tokens tokens_;
};

} // namespace
} // namespace fastkd
