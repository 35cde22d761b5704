// The gradient of kept rows and atom weights, without atomics: what every token contributes is listed, sorted by the row
// it belongs to (stable, so in the order of tokens), and summed in that order.
//
// Kept rows: the sorted list is cut into pieces of 32, one warp each, however long the share of one row is. A row that
// lies within a piece is written; the sum of one that goes on from the piece before is its head, of one that goes on
// behind it its tail; `join` adds a row's tail and heads. All sums depend on the list alone.
#pragma once

#include "sparse_embedding_forward.cuh"

namespace fastkd::sparse {

constexpr int kPiece = 32, kLoadsAtOnce = 4, kDotsAtOnce = 8;

struct Backward {
  Code code;
  Integers ids;
  int64_t count, padding_idx;
  int slots; // contributions that a token has room for: atoms, at least one
  int32_t* row_of; // (count · slots) kept row of each contribution; code.rows for none
  float* weight_of; // (count · slots)
  int32_t* coded_of; // (count) coded row of each token; code.coded for none
};

__global__ void __launch_bounds__(kThreads) contributions(Backward call) {
  const Code& code = call.code;
  for (int64_t at = block() * kThreads + thread(); at < call.count * call.slots; at += blocks() * kThreads) {
    const int64_t token = at / call.slots, id = call.ids[token], place = place_of(code, id);
    const int slot = static_cast<int>(at % call.slots);
    const bool counted = id != call.padding_idx, coded = place >= code.rows;
    Atom given = {code.rows, 1.f};
    if (counted && coded && slot < code.atoms) {
      given = atom_of(code, place - code.rows, slot);
    } else if (counted && !coded && slot == 0) {
      given.row = place;
    }
    call.row_of[at] = static_cast<int32_t>(given.row);
    call.weight_of[at] = given.weight;
    if (slot == 0) {
      call.coded_of[token] = static_cast<int32_t>(counted && coded ? place - code.rows : code.coded);
    }
  }
}

struct KeptGradient {
  const int32_t* rows; // (total) sorted
  const int64_t* places; // (total) where each stood before
  const float* weight_of;
  int64_t total, kept;
  int slots, width;
  Numbers upstream;
  float* partial; // (pieces, 2, width) heads and tails
  void* d_kept;
  Type type;

  __device__ __host__ int64_t pieces() const { return (total + kPiece - 1) / kPiece; }
  // The row at a place of the list, or one that is no row's where there is no such place.
  __device__ int32_t row_at(int64_t at) const { return at < 0 || at >= total ? -1 : rows[at]; }
};

template <class Format>
__global__ void __launch_bounds__(kThreads) kept_gradient(KeptGradient call) {
  constexpr int kColumns = Format::kColumns;
  const Format format(call.upstream.type);
  const int lane = thread() % 32, chunks = call.width / kColumns, slices = (chunks + 31) / 32;
  for (int64_t item = first_item(); item < call.pieces() * slices; item += item_step()) {
    const int64_t piece = item / slices, begin = piece * kPiece;
    const int chunk = static_cast<int>(item % slices) * 32 + lane;
    const int32_t before = call.row_at(begin - 1), behind = call.row_at(begin + kPiece);
    if (call.row_at(begin) >= call.kept) { // contributions to no row come last
      continue;
    }
    int32_t own_row = static_cast<int32_t>(call.kept);
    int64_t own_token = 0;
    float own_weight = 0.f;
    if (begin + lane < call.total && call.rows[begin + lane] < call.kept) {
      const int64_t place = call.places[begin + lane];
      own_row = call.rows[begin + lane], own_token = place / call.slots, own_weight = call.weight_of[place];
    }
    float sum[kColumns] = {};
    int32_t current = shuffle(own_row, 0);
    const auto finish = [&](bool last) {
      const bool head = current == before, tail = last && current == behind;
      if (current >= call.kept || chunk >= chunks) {
        return;
      }
      if (head || tail) {
        store_chunk(call.partial, (2 * piece + !head) * call.width + chunk * kColumns, Type::kFp32, sum);
      } else {
        store_chunk(call.d_kept, int64_t{current} * call.width + chunk * kColumns, call.type, sum);
      }
    };
    for (int first = 0; first < kPiece; first += kLoadsAtOnce) {
      uint32_t words[kLoadsAtOnce][Format::kWords] = {};
      int32_t rows[kLoadsAtOnce];
      float weights[kLoadsAtOnce];
#pragma unroll
      for (int i = 0; i < kLoadsAtOnce; ++i) {
        rows[i] = shuffle(own_row, first + i);
        weights[i] = shuffle(own_weight, first + i);
        const int64_t token = shuffle(own_token, first + i);
        if (rows[i] < call.kept && chunk < chunks) {
          format.load(words[i], call.upstream.data, token * call.width + chunk * kColumns);
        }
      }
#pragma unroll
      for (int i = 0; i < kLoadsAtOnce; ++i) {
        if (rows[i] != current) {
          finish(false);
          current = rows[i];
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            sum[j] = 0.f;
          }
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          sum[j] = fmaf(weights[i], format.value(words[i], j), sum[j]);
        }
      }
    }
    finish(true);
  }
}

// One warp for each piece and slice whose last row goes on: its tail, and the heads of the pieces behind it.
template <int kColumns>
__global__ void __launch_bounds__(kThreads) join(KeptGradient call) {
  const int lane = thread() % 32, chunks = call.width / kColumns, slices = (chunks + 31) / 32;
  for (int64_t item = first_item(); item < call.pieces() * slices; item += item_step()) {
    const int64_t piece = item / slices, end = (piece + 1) * kPiece;
    const int chunk = static_cast<int>(item % slices) * 32 + lane;
    const int32_t row = call.row_at(end - 1);
    const bool begins_here = call.row_at(piece * kPiece - 1) != row;
    if (row < 0 || row >= call.kept || call.row_at(end) != row || !begins_here || chunk >= chunks) {
      continue;
    }
    float sum[kColumns];
    const auto load_part = [&](float (&out)[kColumns], int64_t of, int which) {
      load_chunk(out, call.partial, (2 * of + which) * call.width + chunk * kColumns, Type::kFp32);
    };
    const auto goes_on_to = [&](int64_t of) { return call.row_at(of * kPiece) == row; };
    load_part(sum, piece, 1);
    int64_t next = piece + 1;
    for (; goes_on_to(next + kLoadsAtOnce - 1); next += kLoadsAtOnce) {
      float heads[kLoadsAtOnce][kColumns];
#pragma unroll
      for (int i = 0; i < kLoadsAtOnce; ++i) {
        load_part(heads[i], next + i, 0);
      }
#pragma unroll
      for (int i = 0; i < kLoadsAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          sum[j] += heads[i][j];
        }
      }
    }
    for (; goes_on_to(next); ++next) {
      float head[kColumns];
      load_part(head, next, 0);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        sum[j] += head[j];
      }
    }
    store_chunk(call.d_kept, int64_t{row} * call.width + chunk * kColumns, call.type, sum);
  }
}

struct WeightGradient {
  Code code;
  const int32_t* coded; // (count) sorted coded rows of the tokens
  const int64_t* tokens; // (count) the token of each
  int64_t count;
  Numbers upstream;
  void* d_weights;
  Type type;
};

// One warp for each coded row that occurs: the dot products of its atoms with the sum of its tokens' gradients.
template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) weight_gradient(WeightGradient call) {
  constexpr int kColumns = Format::kColumns;
  const Code& code = call.code;
  const Format format(code.kept.type);
  const int lane = thread() % 32, chunks = code.width / kColumns;
  for (int64_t begin = first_item(); begin < call.count; begin += item_step()) {
    const int64_t row = call.coded[begin];
    if (row >= code.coded || (begin > 0 && call.coded[begin - 1] == row)) {
      continue;
    }
    int64_t end = begin + 1;
    while (end < call.count && call.coded[end] == row) {
      ++end;
    }
    for (int from = 0; from < code.atoms; from += kDotsAtOnce) {
      int64_t own_atom = 0;
      if (lane < kDotsAtOnce && from + lane < code.atoms) {
        own_atom = code.atom_ids[row * code.atoms + from + lane];
      }
      float dots[kDotsAtOnce] = {};
      for (int round = 0; round < chunks; round += 32) {
        const int chunk = round + lane;
        uint32_t words[kDotsAtOnce][Format::kWords] = {};
#pragma unroll
        for (int i = 0; i < kDotsAtOnce; ++i) {
          const int64_t atom = shuffle(own_atom, i);
          if (chunk < chunks && from + i < code.atoms) {
            format.load(words[i], code.kept.data, atom * code.width + chunk * kColumns);
          }
        }
        float sum[kColumns] = {};
        if (chunk < chunks) {
          for (int64_t at = begin; at < end; ++at) {
            float given[kColumns];
            load_chunk(given, call.upstream.data, call.tokens[at] * code.width + chunk * kColumns, call.upstream.type);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
              sum[j] += given[j];
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kDotsAtOnce; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            dots[i] = fmaf(format.value(words[i], j), sum[j], dots[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kDotsAtOnce; ++i) {
        const float dot = warp_sum(dots[i]);
        if (lane == i && from + i < code.atoms) {
          const float out[1] = {code.kept_scale.data ? dot * code.kept_scale[own_atom] : dot};
          store_chunk(call.d_weights, row * code.atoms + from + i, call.type, out);
        }
      }
    }
  }
}

} // namespace fastkd::sparse
