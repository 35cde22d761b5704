// The second sweep of relation_kl_sweeps.cuh: the gradient of the owned rows.
#pragma once

#include "relation_kl_sweeps.cuh"

namespace fastkd {

// m and z of one token, of the student and of the teacher; in a narrow head e, and zero.
struct TokenStats {
  float m_s, z_s, m_t, z_t;
};

// The middle of the row maxima in bits, by which a narrow head's exponentials are measured, or that the head is not narrow.
struct Origin {
  float s, t;
  bool narrow;
};

__device__ inline TokenStats load_stats(const Sweep& sweep, const Place& place, int token) {
  if (token >= place.length) {
    return {0.f, 0.f, 0.f, 0.f};
  }
  const float* stats = stats_of(sweep, place) + token;
  return {stats[0], stats[sweep.stats_plane], stats[2 * sweep.stats_plane], stats[3 * sweep.stats_plane]};
}

// Every block of rows finds the same.
__device__ inline Origin origin_of(const Sweep& sweep, const Place& place, float* reduced) {
  const float* stats = stats_of(sweep, place);
  float extremes[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}; // largest m, and of −m, of both models
  bool valid = true;
  for (int i = thread(); i < place.length; i += threads()) {
    const float m_s = stats[i] * sweep.scale_s, m_t = stats[2 * sweep.stats_plane + i] * sweep.scale_t;
    valid = valid && m_s - m_s == 0.f && m_t - m_t == 0.f; // a NaN would vanish in a maximum
    extremes[0] = fmaxf(extremes[0], m_s), extremes[1] = fmaxf(extremes[1], -m_s);
    extremes[2] = fmaxf(extremes[2], m_t), extremes[3] = fmaxf(extremes[3], -m_t);
  }
  extremes[0] = valid ? extremes[0] : INFINITY;
  for (int i = 0; i < 4; ++i) {
    extremes[i] = max_of_warp(extremes[i]);
    if (thread() % 32 == 0) {
      reduced[thread() / 32 * 4 + i] = extremes[i];
    }
  }
  barrier();
  for (int i = 0; i < 4; ++i) {
    for (int warp = 0; warp < kSweepThreads / 32; ++warp) {
      extremes[i] = fmaxf(extremes[i], reduced[warp * 4 + i]);
    }
  }
  const bool narrow = extremes[0] + extremes[1] <= kNarrow && extremes[2] + extremes[3] <= kNarrow &&
                      extremes[0] <= kLargest && extremes[1] <= kLargest && extremes[2] <= kLargest &&
                      extremes[3] <= kLargest;
  return {0.5f * (extremes[0] - extremes[1]), 0.5f * (extremes[2] - extremes[3]), narrow};
}

// P_ij = exp2(a_ij c − o) e_i.
__device__ inline TokenStats narrow_stats(const TokenStats& x, const Origin& origin, const Sweep& sweep) {
  return {exp2_special(kGradientLog - fmaf(x.m_s, sweep.scale_s, -origin.s) - x.z_s), 0.f,
          exp2_special(kGradientLog - fmaf(x.m_t, sweep.scale_t, -origin.t) - x.z_t), 0.f};
}

// (S − P) · 2^14 of a pair, by the row's stats. Never above one each, whatever the rounding of large scores.
__device__ inline float difference(float s, float t, const TokenStats& row, const Sweep& sweep) {
  const float v = fmaf(s - row.m_s, sweep.scale_s, -row.z_s), u = fmaf(t - row.m_t, sweep.scale_t, -row.z_t);
  return (exp2_special(fminf(v, 0.f)) - exp2_special(fminf(u, 0.f))) * kGradientScale;
}

template <class Precision, int kWidth>
__global__ void __launch_bounds__(kSweepThreads) gradient_sweep(Sweep sweep) {
  constexpr int kColumns = Precision::kColumns, kTiles = kColumns / 8;
  const Tiles<Precision> tiles(sweep);
  const int lane = thread() % 32, warp_row = thread() / 32 * 16 + lane / 4;
  const bool symmetric = sweep.as_rows && sweep.as_columns && !sweep.causal;
  for_each_block(sweep, [&](const Place& place, int first) {
    if (first >= (sweep.batch.packed ? place.length : sweep.batch.max_length)) {
      return;
    }
    float grad[kWidth / 8][4];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      grad[i / 4][i % 4] = 0.f;
    }
    if (first < place.length) {
      const Origin origin = symmetric ? origin_of(sweep, place, tiles.reduced) : Origin{0.f, 0.f, false};
      tiles.load_own(sweep, place, first);
      TokenStats own[2];
      for (int half = 0; half < 2; ++half) {
        own[half] = load_stats(sweep, place, first + warp_row + half * 8);
        if (origin.narrow) {
          own[half] = narrow_stats(own[half], origin, sweep);
        }
      }
      const int begin = sweep.causal && !sweep.as_rows ? first / kColumns * kColumns : 0;
      const int diagonal_end = first + kOwnRows < place.length ? first + kOwnRows : place.length;
      const int end = sweep.causal && !sweep.as_columns ? diagonal_end : place.length;
      // The stats of the next tile's tokens wait in registers while this tile is computed.
      TokenStats ahead = {0.f, 0.f, 0.f, 0.f};
      if (thread() < kColumns) {
        ahead = load_stats(sweep, place, begin + thread());
      }
      const auto publish_stats = [&](int column) {
        if (thread() < kColumns) {
          const TokenStats x = origin.narrow ? narrow_stats(ahead, origin, sweep) : ahead;
          tiles.column_stats[thread()] = x.m_s, tiles.column_stats[kColumns + thread()] = x.z_s;
          tiles.column_stats[2 * kColumns + thread()] = x.m_t, tiles.column_stats[3 * kColumns + thread()] = x.z_t;
          ahead = load_stats(sweep, place, column + kColumns + thread());
        }
      };
      for_each_tile(tiles, sweep, place, begin, end, publish_stats, [&](int column, int slot) {
        float s[kTiles][4], t[kTiles][4];
        tiles.scores_of(sweep, slot, s, t);
        const bool rows_here = sweep.as_rows && (!sweep.causal || column < first + kOwnRows);
        const bool columns_here = sweep.as_columns && (!sweep.causal || column + kColumns > first);
        const float* column_stats = tiles.column_stats + lane % 4 * 2;
        if (origin.narrow) {
#pragma unroll
          for (int i = 0; i < kTiles * 4; ++i) {
            const int half = i % 4 / 2, j = i / 4 * 8 + i % 2;
            const float p_s = exp2_shared(fmaf(s[i / 4][i % 4], sweep.scale_s, -origin.s), 2 * i);
            const float p_t = exp2_shared(fmaf(t[i / 4][i % 4], sweep.scale_t, -origin.t), 2 * i + 1);
            s[i / 4][i % 4] =
                p_s * (own[half].m_s + column_stats[j]) - p_t * (own[half].m_t + column_stats[2 * kColumns + j]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kTiles * 4; ++i) {
            const int half = i % 4 / 2, j = i / 4 * 8 + i % 2;
            const int distance = column + lane % 4 * 2 + j - (first + warp_row + half * 8); // of column and row
            const TokenStats other = {column_stats[j], column_stats[kColumns + j], column_stats[2 * kColumns + j],
                                      column_stats[3 * kColumns + j]};
            float g = 0.f;
            if (rows_here && (!sweep.causal || distance <= 0)) {
              g = difference(s[i / 4][i % 4], t[i / 4][i % 4], own[half], sweep);
            }
            if (columns_here && (!sweep.causal || distance >= 0)) {
              g += difference(s[i / 4][i % 4], t[i / 4][i % 4], other, sweep);
            }
            s[i / 4][i % 4] = g;
          }
        }
        if (column + kColumns > place.length) { // where there is no token, anything may have come out
#pragma unroll
          for (int i = 0; i < kTiles * 4; ++i) {
            s[i / 4][i % 4] = column + lane % 4 * 2 + i / 4 * 8 + i % 2 < place.length ? s[i / 4][i % 4] : 0.f;
          }
        }
#pragma unroll
        for (int k = 0; k < kTiles; k += 2) {
          uint32_t fragment[Precision::kPlanes][4];
          fragment_of<Precision>(fragment, s[k], s[k + 1]);
          accumulate<Precision, kWidth>(grad, fragment, tiles.other_s + slot * tiles.stage + k * 8 * tiles.pitch_s,
                                        kColumns * tiles.pitch_s, sweep.own_s.depth);
        }
      });
    }
    const float factor = gradient_factor(sweep, place);
    const int shift = shift_of(sweep.own_s, place);
    const int limit = sweep.batch.packed ? place.length : sweep.batch.max_length;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + warp_row + half * 8;
      if (token < limit) {
        const int64_t offset = offset_of(sweep.batch, place, token, sweep.grad_row, sweep.grad_sequence,
                                         sweep.own_s.width);
#pragma unroll
        for (int i = 0; i < kWidth / 4; ++i) {
          const int channel = i / 2 * 8 + lane % 4 * 2 + i % 2 - shift;
          if (channel >= 0 && channel < sweep.own_s.width) {
            const float value = token < place.length ? grad[i / 2][2 * half + i % 2] * factor : 0.f;
            store_element(sweep.grad, offset + channel, value, sweep.grad_type);
          }
        }
      }
    }
  });
}

} // namespace fastkd
