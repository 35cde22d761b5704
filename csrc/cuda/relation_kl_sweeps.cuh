// relation_kl for every form and length, in two sweeps. A block of 128 threads owns 64 rows of one (sequence, head), 16
// per warp, and walks over tiles of the other operand's rows, whose scores it computes anew in each sweep:
//
//     row_sweep        online softmax of both models; m and z of each row, the divergence summed per block of rows
//     gradient_sweep   all that flows into the owned rows, as rows and as columns of the relation: no atomics
//
// A probability is exp2((a − m) c − z), with a the unscaled score, m the row's maximum, c = log2(e) / √d and z the log2 of
// the row's sum. m and z are kept apart: at large scores the fp32 sum m c + z forgets z. For the same reason the
// divergence of a row is added up from u and v = (a − m) c of teacher and student:
//
//     KL / ln 2 = Σ_j exp2(u_j) (u_j − v_j) / Σ_j exp2(u_j) − z_teacher + z_student
//
// In names, `_s` belongs to the student and `_t` to the teacher; the owner is left and the other right, and for the
// gradient of the right operand right and left.
#pragma once

#include "relation_kl_product.cuh"

namespace fastkd {

constexpr int kOwnRows = 64, kSweepThreads = 128;
constexpr float kMasked = -1e30f;
constexpr float kLn2 = 0.693147180559945f;
// G shrinks with the length of the sequence and would fall among fp16's subnormals; |G + Gᵀ| <= 2 stays in range.
constexpr float kGradientScale = 16384.f, kGradientLog = 14.f;
// A head whose row maxima (or squared norms) lie within so many bits of each other, and are not so large that one rounding
// of them counts, takes one exponential per pair of tokens: P_ij + P_ji = exp2(a_ij c − o) (e_i + e_j).
constexpr float kNarrow = 64.f, kLargest = 1e6f;

struct Sweep {
  Operand own_s, other_s, own_t, other_t;
  Batch batch;
  float scale_s, scale_t; // log2(e) / √width
  bool causal;
  bool as_rows, as_columns; // what the owned tokens are, in the gradient
  int blocks; // of rows, in the longest sequence
  bool stage_twice; // the next tile is copied while this one is computed
  // Per head and row, four planes: m and z of the student, m and z of the teacher. Null if there is no gradient.
  float* stats;
  int64_t stats_plane, stats_head, stats_sequence;
  // Divergence of each block of rows. Packed sequence i, which starts at row s, has the slots from s / 64 + i on.
  float* partial;
  int64_t partial_head, partial_sequence;
  void* grad; // contiguous
  int64_t grad_row, grad_sequence;
  Type grad_type;
  float weight; // 1 / (heads · divisor)
  // What the resident kernel left over: per (sequence, head), and counters[1] of them; null where it did not run.
  int32_t* pending;
  int32_t* counters;
};

__device__ inline float* stats_of(const Sweep& sweep, const Place& place) {
  return sweep.stats + place.head * sweep.stats_head + place.sequence * sweep.stats_sequence + place.start;
}

__device__ inline float* partial_of(const Sweep& sweep, const Place& place) {
  return sweep.partial + place.head * sweep.partial_head + place.sequence * sweep.partial_sequence +
         place.start / kOwnRows;
}

// From a sum of (S − P) · 2^14 to the gradient: 1 / √d, and the loss's own factor unless it is left to backward.
__device__ inline float gradient_factor(const Sweep& sweep, const Place& place) {
  const float factor = sweep.scale_s * (kLn2 / kGradientScale);
  return sweep.grad_type == Type::kFp16 ? factor : factor * (sweep.weight / static_cast<float>(place.length));
}

// Where the operands lie in shared memory.
template <class Precision>
struct Tiles {
  static constexpr int kColumns = Precision::kColumns;

  __device__ explicit Tiles(const Sweep& sweep)
      : pitch_s(pitch_of(sweep.own_s.depth)), pitch_t(pitch_of(sweep.own_t.depth)) {
    char* next = shared_memory();
    reduced = reinterpret_cast<float*>(next);
    column_stats = reduced + 64;
    next += 256 + 16 * kColumns;
    own_s = next, next += Precision::kPlanes * kOwnRows * pitch_s;
    own_t = next, next += Precision::kPlanes * kOwnRows * pitch_t;
    other_s = next;
    stage = Precision::kPlanes * kColumns * (pitch_s + pitch_t);
  }

  __host__ __device__ static int bytes(int depth_s, int depth_t, int stages) {
    return 256 + 16 * kColumns +
           Precision::kPlanes * (pitch_of(depth_s) + pitch_of(depth_t)) * (kOwnRows + stages * kColumns);
  }

  __device__ void load_own(const Sweep& sweep, const Place& place, int first) const {
    load_rows<Precision>(own_s, sweep.own_s, sweep.batch, place, first, kOwnRows, true);
    load_rows<Precision>(own_t, sweep.own_t, sweep.batch, place, first, kOwnRows, true);
  }

  __device__ void load_other(const Sweep& sweep, const Place& place, int first, int slot) const {
    load_rows<Precision>(other_s + slot * stage, sweep.other_s, sweep.batch, place, first, kColumns, false);
    load_rows<Precision>(other_t(slot), sweep.other_t, sweep.batch, place, first, kColumns, false);
  }

  __device__ char* other_t(int slot) const { return other_s + slot * stage + Precision::kPlanes * kColumns * pitch_s; }

  // Of this warp's 16 rows with the tile in a slot.
  __device__ void scores_of(const Sweep& sweep, int slot, float (&s)[kColumns / 8][4], float (&t)[kColumns / 8][4]) const {
    const int row = thread() / 32 * 16;
    scores<Precision>(t, own_t + row * pitch_t, kOwnRows * pitch_t, other_t(slot), kColumns * pitch_t, sweep.own_t.depth);
    scores<Precision>(s, own_s + row * pitch_s, kOwnRows * pitch_s, other_s + slot * stage, kColumns * pitch_s,
                      sweep.own_s.depth);
  }

  int pitch_s, pitch_t, stage; // bytes of a row; bytes of a tile of both models
  char *own_s, *own_t, *other_s;
  float* column_stats; // 4 x kColumns
  float* reduced;
};

// Walks over the tiles [begin, end). before(first) runs ahead of a barrier, compute(first, slot) behind it.
template <class Precision, class Before, class Compute>
__device__ inline void for_each_tile(const Tiles<Precision>& tiles, const Sweep& sweep, const Place& place, int begin,
                                     int end, Before before, Compute compute) {
  constexpr int kColumns = Precision::kColumns;
  int slot = 0;
  if (begin < end) {
    tiles.load_other(sweep, place, begin, slot);
  }
  for (int first = begin; first < end; first += kColumns) {
    before(first);
    wait_for_copies();
    barrier();
    const int next = first + kColumns, next_slot = sweep.stage_twice ? 1 - slot : 0;
    if (sweep.stage_twice && next < end) {
      tiles.load_other(sweep, place, next, next_slot);
    }
    compute(first, slot);
    barrier();
    if (!sweep.stage_twice && next < end) {
      tiles.load_other(sweep, place, next, next_slot);
    }
    slot = next_slot;
  }
}

// Tasks are blocks of rows, those of the longest sequence first.
template <class Body>
__device__ inline void for_each_block(const Sweep& sweep, Body body) {
  if (sweep.pending && sweep.counters[1] == 0) {
    return;
  }
  const int64_t per_sequence = static_cast<int64_t>(sweep.batch.heads) * sweep.blocks;
  for (int64_t task = block(); task < sweep.batch.sequences * per_sequence; task += blocks()) {
    const int head = static_cast<int>(task % per_sequence / sweep.blocks);
    const Place place = place_of(sweep.batch, task / per_sequence, head);
    if (!sweep.pending || sweep.pending[place.sequence * sweep.batch.heads + head]) {
      body(place, static_cast<int>(task % sweep.blocks) * kOwnRows);
    }
  }
}

struct RowSums {
  float max_s[2], max_t[2], sum_s[2], sum_t[2], cross[2];
};

// Adds one tile to the two rows whose columns this lane shares with its three neighbours. The maxima are those of the
// whole rows, the sums those of the lane's own columns.
template <int kTiles>
__device__ inline void add_tile(RowSums& rows, const float (&s)[kTiles][4], const float (&t)[kTiles][4], float scale_s,
                                float scale_t) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float max_s = kMasked, max_t = kMasked;
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      max_s = fmaxf(max_s, s[i / 2][2 * half + i % 2]);
      max_t = fmaxf(max_t, t[i / 2][2 * half + i % 2]);
    }
    max_s = fmaxf(rows.max_s[half], max_of_four_lanes(max_s));
    max_t = fmaxf(rows.max_t[half], max_of_four_lanes(max_t));
    // What has been added so far was relative to smaller maxima; before the first tile it is zero.
    const float shift_s = (rows.max_s[half] - max_s) * scale_s, shift_t = (rows.max_t[half] - max_t) * scale_t;
    const float factor_s = exp2_special(shift_s), factor_t = exp2_special(shift_t);
    float cross = (rows.cross[half] + rows.sum_t[half] * (shift_t - shift_s)) * factor_t;
    float sum_s = rows.sum_s[half] * factor_s, sum_t = rows.sum_t[half] * factor_t;
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const float u = (t[i / 2][2 * half + i % 2] - max_t) * scale_t;
      const float v = (s[i / 2][2 * half + i % 2] - max_s) * scale_s;
      const float p = exp2_special(u);
      sum_s += exp2_shared(v, 2 * i + 1); // the teacher's are the even ones
      sum_t += p;
      cross = fmaf(p, u - v, cross);
    }
    rows.max_s[half] = max_s, rows.max_t[half] = max_t;
    rows.sum_s[half] = sum_s, rows.sum_t[half] = sum_t, rows.cross[half] = cross;
  }
}

template <class Precision>
__global__ void __launch_bounds__(kSweepThreads) row_sweep(Sweep sweep) {
  constexpr int kColumns = Precision::kColumns, kTiles = kColumns / 8;
  const Tiles<Precision> tiles(sweep);
  const int lane = thread() % 32, warp_row = thread() / 32 * 16 + lane / 4;
  for_each_block(sweep, [&](const Place& place, int first) {
    if (first >= place.length) {
      return;
    }
    tiles.load_own(sweep, place, first);
    RowSums rows;
    for (int half = 0; half < 2; ++half) {
      rows.max_s[half] = rows.max_t[half] = kMasked;
      rows.sum_s[half] = rows.sum_t[half] = rows.cross[half] = 0.f;
    }
    const int end = sweep.causal && first + kOwnRows < place.length ? first + kOwnRows : place.length;
    for_each_tile(tiles, sweep, place, 0, end, [](int) {}, [&](int column, int slot) {
      float s[kTiles][4], t[kTiles][4];
      tiles.scores_of(sweep, slot, s, t);
      if (column + kColumns > place.length || (sweep.causal && column + kColumns > first)) {
#pragma unroll
        for (int i = 0; i < kTiles * 4; ++i) {
          const int j = column + i / 4 * 8 + lane % 4 * 2 + i % 2, row = first + warp_row + i % 4 / 2 * 8;
          if (j >= place.length || (sweep.causal && j > row)) {
            s[i / 4][i % 4] = t[i / 4][i % 4] = kMasked;
          }
        }
      }
      add_tile(rows, s, t, sweep.scale_s, sweep.scale_t);
    });
    float divergence = 0.f;
    for (int half = 0; half < 2; ++half) {
      const float sum_t = sum_of_four_lanes(rows.sum_t[half]), cross = sum_of_four_lanes(rows.cross[half]);
      const float z_s = log2f(sum_of_four_lanes(rows.sum_s[half])), z_t = log2f(sum_t);
      const int row = first + warp_row + half * 8;
      if (lane % 4 == 0 && row < place.length) {
        divergence += cross / sum_t - z_t + z_s;
        if (sweep.stats) {
          float* stats = stats_of(sweep, place) + row;
          stats[0] = rows.max_s[half], stats[sweep.stats_plane] = z_s;
          stats[2 * sweep.stats_plane] = rows.max_t[half], stats[3 * sweep.stats_plane] = z_t;
        }
      }
    }
    divergence = sum_of_warp(divergence);
    if (lane == 0) {
      tiles.reduced[thread() / 32] = divergence;
    }
    barrier();
    if (thread() == 0) {
      float sum = 0.f;
      for (int warp = 0; warp < kSweepThreads / 32; ++warp) {
        sum += tiles.reduced[warp];
      }
      partial_of(sweep, place)[first / kOwnRows] = sum * kLn2;
    }
    barrier(); // before the next task writes to shared memory
  });
}

} // namespace fastkd
