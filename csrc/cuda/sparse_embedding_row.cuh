// One token's row, chunk by chunk, by one warp: a kept row, or atoms summed in fp32, several of them on the way at once.
#pragma once

#include "sparse_embedding_numbers.cuh"

namespace fastkd::sparse {

// Ids, slots and atoms: integers of 16, 32 or 64 bits.
struct Integers {
  const void* data;
  int bytes;

  __device__ int64_t operator[](int64_t at) const {
    return bytes == 2   ? static_cast<const uint16_t*>(data)[at]
           : bytes == 4 ? static_cast<const int32_t*>(data)[at]
                        : static_cast<const int64_t*>(data)[at];
  }
};

struct Numbers {
  const void* data; // nullptr where there are none
  Type type;

  __device__ float operator[](int64_t at) const { return load_number(data, at, type); }
};

// The arrays of the schema (fastkd/ops/sparse_arrays.py).
struct Code {
  Integers slot, atom_ids;
  Numbers kept, kept_scale, atom_weights, weight_scale, codebook;
  const uint8_t* residual;
  int64_t tokens, rows, coded;
  int width, atoms, parts;
  bool wide_parts; // a chunk lies within one part of the residual
};

// Nothing is read behind an index that is out of range.
__device__ inline int64_t checked(int64_t index, int64_t count, const char* what) {
  if (index < 0 || index >= count) {
    fail(what);
  }
  return index;
}

__device__ inline int64_t place_of(const Code& code, int64_t token) {
  checked(token, code.tokens, "sparse_embedding: an id is out of range");
  return checked(code.slot[token], code.tokens, "sparse_embedding: the code's slot is out of range");
}

struct Atom {
  int64_t row;
  float weight; // with all scales in it
};

__device__ inline Atom atom_of(const Code& code, int64_t coded, int atom) {
  const int64_t at = coded * code.atoms + atom;
  const int64_t row = checked(code.atom_ids[at], code.rows, "sparse_embedding: the code's atom is out of range");
  float weight = code.atom_weights[at];
  if (code.weight_scale.data) {
    weight *= code.weight_scale[coded];
  }
  if (code.kept_scale.data) {
    weight *= code.kept_scale[row];
  }
  return {row, weight};
}

// The quantised residual of columns `column` and those behind it.
template <int kColumns>
__device__ inline void residual_chunk(float (&out)[kColumns], const Code& code, int64_t coded, int column) {
  const int part_width = code.width / code.parts;
  int part = column / part_width, within = column % part_width;
  const bool half = code.codebook.type == Type::kFp16; // fp32 otherwise
  const auto entry = [&] { return (int64_t{part} * 256 + code.residual[coded * code.parts + part]) * part_width + within; };
  if (kColumns > 1 && code.wide_parts) {
    load_chunk(out, code.codebook.data, entry(), code.codebook.type);
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    out[i] = half ? widen_fp16(static_cast<const uint16_t*>(code.codebook.data)[entry()])
                  : static_cast<const float*>(code.codebook.data)[entry()];
    if (++within == part_width) {
      within = 0, ++part;
    }
  }
}

// Gives `take(chunk, values)` the chunks first + lane, first + step + lane, ... of the token's row, each to one lane.
template <class Format, class Take>
__device__ inline void for_each_chunk(const Code& code, int64_t token, int first, int step, Take take) {
  // Loads on the way at once, as many as registers hold together with the numbers that come of them.
  constexpr int kColumns = Format::kColumns, kRoundsAtOnce = kColumns < 8 ? 4 : 2, kAtomsAtOnce = kColumns > 8 ? 4 : 8;
  const Format format(code.kept.type);
  const int lane = thread() % 32, chunks = code.width / kColumns;
  const int64_t place = place_of(code, token);
  if (place < code.rows) {
    const float scale = code.kept_scale.data ? code.kept_scale[place] : 1.f;
    for (int round = first; round < chunks; round += kRoundsAtOnce * step) {
      uint32_t words[kRoundsAtOnce][Format::kWords];
#pragma unroll
      for (int i = 0; i < kRoundsAtOnce; ++i) {
        const int chunk = round + i * step + lane;
        if (chunk < chunks) {
          format.load(words[i], code.kept.data, place * code.width + chunk * kColumns);
        }
      }
#pragma unroll
      for (int i = 0; i < kRoundsAtOnce; ++i) {
        const int chunk = round + i * step + lane;
        if (chunk < chunks) {
          float values[kColumns];
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            values[j] = format.value(words[i], j) * scale;
          }
          take(chunk, values);
        }
      }
    }
    return;
  }
  const int64_t coded = place - code.rows;
  Atom own = {0, 0.f}; // each lane knows one of 32 atoms
  const auto know_atoms = [&](int from) {
    if (from + lane < code.atoms) {
      own = atom_of(code, coded, from + lane);
    }
  };
  know_atoms(0);
  for (int round = first; round < chunks; round += step) {
    const int chunk = round + lane;
    const bool inside = chunk < chunks;
    float values[kColumns] = {};
    if (inside && code.residual) {
      residual_chunk(values, code, coded, chunk * kColumns);
    }
    for (int from = 0; from < code.atoms; from += kAtomsAtOnce) {
      if (code.atoms > 32 && from % 32 == 0) {
        know_atoms(from);
      }
      uint32_t words[kAtomsAtOnce][Format::kWords] = {};
      float weights[kAtomsAtOnce];
#pragma unroll
      for (int i = 0; i < kAtomsAtOnce; ++i) {
        const int64_t row = shuffle(own.row, (from + i) % 32);
        weights[i] = shuffle(own.weight, (from + i) % 32);
        if (inside && from + i < code.atoms) {
          format.load(words[i], code.kept.data, row * code.width + chunk * kColumns);
        } else {
          weights[i] = 0.f;
        }
      }
#pragma unroll
      for (int i = 0; i < kAtomsAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          values[j] = fmaf(weights[i], format.value(words[i], j), values[j]);
        }
      }
    }
    if (inside) {
      take(chunk, values);
    }
  }
}

} // namespace fastkd::sparse
