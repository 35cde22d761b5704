// relation_kl for self relations that are not causal, where a whole (sequence, head) fits in a block's shared memory: loss
// and gradient in one kernel, every pair of tokens computed once per sweep.
//
// With t_ij = a_ij c − o, a_ij the symmetric scores, c = log2(e) / √d and o halfway between the largest and the smallest
// a_ii c, E = exp2(t) is symmetric and stays in fp32's range as long as the a_ii lie within kNarrow bits. Then
//
//     Z_i = Σ_j E_ij,  KL_i / ln 2 = Σ_j E_ij (t_ij − s_ij) / Z_i − log2 Z_i + log2 Z'_i   (t, E, Z teacher; s, E', Z' student)
//     (G + Gᵀ)_ij = E'_ij (1/Z'_i + 1/Z'_j) − E_ij (1/Z_i + 1/Z_j)
//
// A head whose diagonal spreads farther is left to the sweeps.
//
// The tokens fall into nb blocks, one per warp. In step k warp i computes tile (i, i + k mod nb), k = 0 ... nb / 2: so every
// pair of blocks comes up once, all warps have as much to do, and what a tile adds to its columns' sums in shared memory
// nobody else adds to in the same step. No atomics, and every run adds in the same order.
#pragma once

#include "relation_kl_sweeps.cuh"

namespace fastkd {

// The sums of a column: Z', Z and the cross term, in eight parts, one per row of lanes.
constexpr int kColumnSums = 3, kColumnParts = 8;

// Tokens a block can hold: 16 warps of 128 registers, or 8 of 255.
constexpr int resident_threads(int width) { return width <= 16 ? 512 : 256; }

// 2^14 / Z of a token in both models.
struct alignas(8) Weights {
  float s, t;
};
struct alignas(16) TwoWeights {
  Weights first, second;
};

// kWidth and kTeacherWidth: the elements of a token in shared memory, 16, 32 or 64.
template <class Precision, int kWidth, int kTeacherWidth>
struct Resident {
  const Sweep& sweep;
  int capacity; // tokens: the longest sequence rounded up to 64
  char *tokens_s, *tokens_t;
  float* sums; // [kColumnSums][kColumnParts][capacity + 8]; afterwards the gradient, [capacity][kWidth + 4]
  Weights* weights;
  float* reduced;
  float origin_s, origin_t;
  int length;

  static constexpr int kStrip = kWidth <= 16 ? 16 : 32; // columns computed at a time: 32 do not fit in 128 registers
  static constexpr int kPitch = pitch_of(kWidth), kTeacherPitch = pitch_of(kTeacherWidth), kGradPitch = kWidth + 4;

  __host__ __device__ static int capacity_of(int max_length) { return (max_length + 63) / 64 * 64; }

  __host__ __device__ static int sums_bytes(int capacity) {
    const int sums = kColumnSums * kColumnParts * (capacity + 8), gradient = capacity * kGradPitch;
    return 4 * (sums > gradient ? sums : gradient);
  }

  __host__ __device__ static int bytes(int max_length) {
    const int capacity = capacity_of(max_length);
    return 512 + capacity * (8 + kPitch + kTeacherPitch) + sums_bytes(capacity);
  }

  __device__ explicit Resident(const Sweep& sweep) : sweep(sweep), capacity(capacity_of(sweep.batch.max_length)) {
    reduced = reinterpret_cast<float*>(shared_memory());
    weights = reinterpret_cast<Weights*>(reduced + 128), sums = reduced + 128 + 2 * capacity;
    tokens_s = reinterpret_cast<char*>(sums) + sums_bytes(capacity);
    tokens_t = tokens_s + capacity * kPitch;
  }

  // The largest of a value over the block, for every thread. `slot` keeps neighbouring calls apart.
  __device__ float max_of_block(float value, int slot) const {
    value = max_of_warp(value);
    if (thread() % 32 == 0) {
      reduced[slot * 16 + thread() / 32] = value;
    }
    barrier();
    for (int warp = 0; warp < threads() / 32; ++warp) {
      value = fmaxf(value, reduced[slot * 16 + warp]);
    }
    return value;
  }

  __device__ float squared_norm(const char* row, int depth) const {
    float sum = 0.f;
    for (int chunk = 0; chunk < depth / 8; ++chunk) {
      const Chunk x = reinterpret_cast<const Chunk*>(row)[chunk];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = Precision::widen(x.words[i] & 0xffffu), high = Precision::widen(x.words[i] >> 16);
        sum = fmaf(low, low, fmaf(high, high, sum));
      }
    }
    return sum;
  }

  // Sets the origins; false where the diagonal spreads too far, or is not finite.
  __device__ bool measure() {
    float top_s = -INFINITY, low_s = -INFINITY, top_t = -INFINITY, low_t = -INFINITY;
    bool valid = true;
    for (int i = thread(); i < length; i += threads()) {
      const float s = squared_norm(tokens_s + i * kPitch, kWidth) * sweep.scale_s;
      const float t = squared_norm(tokens_t + i * kTeacherPitch, kTeacherWidth) * sweep.scale_t;
      valid = valid && s - s == 0.f && t - t == 0.f; // a NaN would vanish in a maximum
      top_s = fmaxf(top_s, s), low_s = fmaxf(low_s, -s), top_t = fmaxf(top_t, t), low_t = fmaxf(low_t, -t);
    }
    top_s = max_of_block(valid ? top_s : INFINITY, 0), low_s = max_of_block(low_s, 1);
    top_t = max_of_block(top_t, 2), low_t = max_of_block(low_t, 3);
    origin_s = 0.5f * (top_s - low_s), origin_t = 0.5f * (top_t - low_t);
    return top_s + low_s <= kNarrow && top_t + low_t <= kNarrow && top_s <= kLargest && top_t <= kLargest;
  }

  // Unscaled, of 16 rows and the columns of a strip, in both models.
  template <int kTiles>
  __device__ void scores_of(int row, int column, float (&s)[kTiles][4], float (&t)[kTiles][4]) const {
    scores<Precision, kTiles, kTeacherWidth / 16>(t, tokens_t + row * kTeacherPitch, 0,
                                                      tokens_t + column * kTeacherPitch, 0, kTeacherWidth);
    scores<Precision, kTiles, kWidth / 16>(s, tokens_s + row * kPitch, 0, tokens_s + column * kPitch, 0, kWidth);
  }

  template <int kBlock>
  __device__ void sum_tile(int i, int j, float (&rows)[kBlock / 8][kColumnSums]) const {
    const int lane = thread() % 32;
    const bool edge = (i > j ? i + 1 : j + 1) * kBlock > length;
#pragma unroll 1
    for (int column = j * kBlock; column < (j + 1) * kBlock; column += kStrip) {
      float columns[kStrip / 4][kColumnSums];
#pragma unroll
      for (int k = 0; k < kStrip / 4 * kColumnSums; ++k) {
        columns[k / kColumnSums][k % kColumnSums] = 0.f;
      }
#pragma unroll
      for (int m = 0; m < kBlock / 16; ++m) {
        float s[kStrip / 8][4], t[kStrip / 8][4];
        scores_of(i * kBlock + m * 16, column, s, t);
#pragma unroll
        for (int k = 0; k < kStrip / 2; ++k) {
          const float u = fmaf(t[k / 4][k % 4], sweep.scale_t, -origin_t);
          const float v = fmaf(s[k / 4][k % 4], sweep.scale_s, -origin_s);
          float p = exp2_shared(u, 2 * k), q = exp2_shared(v, 2 * k + 1);
          if (edge) {
            const int row = i * kBlock + m * 16 + lane / 4 + k % 4 / 2 * 8;
            const bool pair = row < length && column + k / 4 * 8 + lane % 4 * 2 + k % 2 < length;
            p = pair ? p : 0.f, q = pair ? q : 0.f;
          }
          const float cross = p * (u - v);
          float(&of_row)[kColumnSums] = rows[m * 2 + k % 4 / 2];
          float(&of_column)[kColumnSums] = columns[k / 4 * 2 + k % 2];
          of_row[0] += q, of_row[1] += p, of_row[2] += cross;
          of_column[0] += q, of_column[1] += p, of_column[2] += cross;
        }
      }
      if (i != j) { // a tile on the diagonal holds both of (i, j) and (j, i)
#pragma unroll
        for (int k = 0; k < kStrip / 4 * kColumnSums; ++k) {
          const int sum = k / (kStrip / 4), at = k % (kStrip / 4);
          float* part = sums + (sum * kColumnParts + lane / 4) * (capacity + 8);
          part[column + at / 2 * 8 + lane % 4 * 2 + at % 2] += columns[at][sum];
        }
      }
    }
  }

  template <int kBlock>
  __device__ void gradient_tile(int i, int j, float (&rows)[kBlock / 16][kWidth / 8][4]) const {
    const int lane = thread() % 32;
#pragma unroll 1
    for (int column = j * kBlock; column < (j + 1) * kBlock; column += kStrip) {
      float columns[kStrip / 16][kWidth / 8][4];
#pragma unroll
      for (int k = 0; k < kStrip * kWidth / 32; ++k) {
        columns[k / (kWidth / 2)][k / 4 % (kWidth / 8)][k % 4] = 0.f;
      }
#pragma unroll
      for (int m = 0; m < kBlock / 16; ++m) {
        const int row = i * kBlock + m * 16;
        float s[kStrip / 8][4], t[kStrip / 8][4];
        scores_of(row, column, s, t);
        const Weights own[2] = {weights[row + lane / 4], weights[row + lane / 4 + 8]};
#pragma unroll
        for (int tile = 0; tile < kStrip / 8; ++tile) {
          const auto both = *reinterpret_cast<const TwoWeights*>(weights + column + tile * 8 + lane % 4 * 2);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const Weights other = k % 2 ? both.second : both.first;
            const float p = exp2_shared(fmaf(t[tile][k], sweep.scale_t, -origin_t), 2 * k);
            const float q = exp2_shared(fmaf(s[tile][k], sweep.scale_s, -origin_s), 2 * k + 1);
            s[tile][k] = q * (own[k / 2].s + other.s) - p * (own[k / 2].t + other.t);
          }
        }
#pragma unroll
        for (int k = 0; k < kStrip / 16; ++k) {
          uint32_t fragment[1][4];
          fragment_of<Precision>(fragment, s[2 * k], s[2 * k + 1]);
          const char* others = tokens_s + (column + k * 16) * kPitch;
          accumulate<Precision, kWidth>(rows[m], fragment, others, 0, kWidth);
          if (i != j) {
            uint32_t flipped[1][4] = {{transposed(fragment[0][0]), transposed(fragment[0][2]),
                                       transposed(fragment[0][1]), transposed(fragment[0][3])}};
            accumulate<Precision, kWidth>(columns[k], flipped, tokens_s + row * kPitch, 0, kWidth);
          }
        }
      }
      if (i != j) {
        for (int k = 0; k < kStrip / 16; ++k) {
          add_gradient(column + k * 16, columns[k]);
        }
      }
    }
  }

  // To the 16 tokens from `first` on.
  __device__ void add_gradient(int first, const float (&values)[kWidth / 8][4]) const {
    const int lane = thread() % 32;
#pragma unroll
    for (int k = 0; k < kWidth / 2; ++k) {
      const int token = first + lane / 4 + k % 4 / 2 * 8;
      sums[token * kGradPitch + k / 4 * 8 + lane % 4 * 2 + k % 2] += values[k / 4][k % 4];
    }
  }

  // tile(i, j) for every pair of blocks, see above.
  template <int kBlock, class Tile>
  __device__ void for_each_tile(Tile tile) const {
    const int count = (length + kBlock - 1) / kBlock, i = thread() / 32;
    for (int step = 0; 2 * step <= count; ++step) {
      if (i < count && (2 * step < count || i < step)) {
        tile(i, i + step < count ? i + step : i + step - count);
      }
      barrier();
    }
  }

  __device__ void clear_sums() const {
    barrier();
    for (int i = thread(); i < sums_bytes(capacity) / 4; i += threads()) {
      sums[i] = 0.f;
    }
    barrier();
  }

  // From the sums of rows and columns to weights; returns Σ_rows KL / ln 2 on thread 0.
  __device__ float finish_rows() const {
    float divergence = 0.f;
    for (int i = thread(); i < capacity; i += threads()) {
      float total[kColumnSums] = {};
      for (int k = 0; k < kColumnSums * kColumnParts; ++k) {
        total[k / kColumnParts] += sums[k * (capacity + 8) + i];
      }
      const bool token = i < length;
      weights[i] = {token ? kGradientScale / total[0] : 0.f, token ? kGradientScale / total[1] : 0.f};
      divergence += token ? total[2] / total[1] - log2f(total[1]) + log2f(total[0]) : 0.f;
    }
    divergence = sum_of_warp(divergence);
    if (thread() % 32 == 0) {
      reduced[64 + thread() / 32] = divergence;
    }
    barrier();
    divergence = 0.f;
    for (int warp = 0; warp < threads() / 32; ++warp) {
      divergence += reduced[64 + warp];
    }
    return divergence;
  }

  template <int kBlock>
  __device__ float sum_rows() const {
    const int lane = thread() % 32, first = thread() / 32 * kBlock;
    float rows[kBlock / 8][kColumnSums] = {};
    clear_sums();
    for_each_tile<kBlock>([&](int i, int j) { sum_tile<kBlock>(i, j, rows); });
    if (first < length) {
#pragma unroll
      for (int k = 0; k < kBlock / 8 * kColumnSums; ++k) {
        const int row = k / kColumnSums, sum = k % kColumnSums;
        const float value = sum_of_four_lanes(rows[row][sum]);
        if (lane % 4 == 0) {
          sums[sum * kColumnParts * (capacity + 8) + first + row / 2 * 16 + row % 2 * 8 + lane / 4] += value;
        }
      }
    }
    barrier();
    return finish_rows();
  }

  template <int kBlock>
  __device__ void sum_gradient() const {
    const int first = thread() / 32 * kBlock;
    float rows[kBlock / 16][kWidth / 8][4] = {};
    clear_sums();
    for_each_tile<kBlock>([&](int i, int j) { gradient_tile<kBlock>(i, j, rows); });
    if (first < length) {
#pragma unroll
      for (int m = 0; m < kBlock / 16; ++m) {
        add_gradient(first + m * 16, rows[m]);
      }
    }
    barrier();
  }

  // The gradient of all tokens, and zero for padding; of neighbouring channels two lie side by side in a thread.
  __device__ void write_gradient(const Place& place) const {
    const float factor = gradient_factor(sweep, place);
    const int width = sweep.own_s.width, shift = shift_of(sweep.own_s, place);
    const int limit = sweep.batch.packed ? length : sweep.batch.max_length;
    for (int i = thread(); i < limit * kWidth; i += threads()) {
      const int token = i / kWidth, channel = i % kWidth - shift;
      if (channel >= 0 && channel < width) {
        const int64_t offset = offset_of(sweep.batch, place, token, sweep.grad_row, sweep.grad_sequence, width);
        const float value = token < length ? sums[token * kGradPitch + i % kWidth] * factor : 0.f;
        store_element(sweep.grad, offset + channel, value, sweep.grad_type);
      }
    }
  }
};

// Blocks stay and take one (sequence, head) after the other, the longest first.
template <class Precision, int kWidth, int kTeacherWidth>
__global__ void __launch_bounds__(resident_threads(kWidth), 1) resident(Sweep sweep) {
  Resident<Precision, kWidth, kTeacherWidth> head(sweep);
  const int64_t tasks = sweep.batch.sequences * sweep.batch.heads;
  auto* next = reinterpret_cast<int32_t*>(head.reduced + 96);
  // Asked for anew whenever it is needed: registers are short.
  const auto place = [&] {
    return place_of(sweep.batch, *next / sweep.batch.heads, static_cast<int>(*next % sweep.batch.heads));
  };
  const auto load = [&](const Place& of) {
    load_rows<Precision>(head.tokens_s, sweep.own_s, sweep.batch, of, 0, head.capacity, true);
    load_rows<Precision>(head.tokens_t, sweep.own_t, sweep.batch, of, 0, head.capacity, true);
    wait_for_copies();
    barrier();
  };
  for (;;) {
    barrier();
    if (thread() == 0) {
      *next = take_next(&sweep.counters[0]);
    }
    barrier();
    if (*next >= tasks) {
      return;
    }
    load(place());
    head.length = place().length;
    const bool narrow = head.length == 0 || head.measure();
    if (thread() == 0) {
      sweep.pending[place().sequence * sweep.batch.heads + place().head] = !narrow;
      if (!narrow) {
        take_next(&sweep.counters[1]);
      }
    }
    if (!narrow) {
      continue;
    }
    // Short sequences in smaller blocks, so that more warps have one.
    const bool small = head.length <= threads() / 32 * 32;
    const float divergence = small ? head.template sum_rows<32>() : head.template sum_rows<64>();
    const int used = (head.length + kOwnRows - 1) / kOwnRows; // the sum has a slot for each, and this head needs one
    for (int i = thread(); i < used; i += threads()) {
      partial_of(sweep, place())[i] = i == 0 ? divergence * kLn2 : 0.f;
    }
    if (sweep.stats) {
      if (small) {
        head.template sum_gradient<32>();
      } else {
        head.template sum_gradient<64>();
      }
      head.write_gradient(place());
    }
  }
}

} // namespace fastkd
