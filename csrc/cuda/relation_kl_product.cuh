// Products of tiles on the tensor cores, in three precisions, and exponentials.
#pragma once

#include "relation_kl_operand.cuh"

namespace fastkd {

struct Bf16 {
  static constexpr int kPlanes = 1, kColumns = 64;
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_bf16(c, a, b0, b1);
  }
  __device__ static void split(float low, float high, uint32_t (&planes)[1]) { planes[0] = pack_bf16(low, high); }
  __device__ static float widen(uint32_t bits) { return widen_bf16(bits); }
};

struct Fp16 {
  static constexpr int kPlanes = 1, kColumns = 64;
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_fp16(c, a, b0, b1);
  }
  __device__ static void split(float low, float high, uint32_t (&planes)[1]) { planes[0] = pack_fp16(low, high); }
  __device__ static float widen(uint32_t bits) { return widen_fp16(bits); }
};

// fp32, and whatever mixes dtypes, as the sum of three bf16 numbers: 24 bits. Six of the nine products count; that is as
// much work as tf32 in three products, at eight bits more, and the fragments are those of bf16.
struct Split {
  static constexpr int kPlanes = 3, kColumns = 32;
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_bf16(c, a, b0, b1);
  }
  __device__ static void split(float low, float high, uint32_t (&planes)[3]) {
    for (int plane = 0; plane < 3; ++plane) {
      planes[plane] = pack_bf16(low, high);
      low -= widen_bf16(planes[plane] & 0xffffu);
      high -= widen_bf16(planes[plane] >> 16);
    }
  }
};

// 2^x on the FMA pipes, x <= 127: degree five, relative error below 3e-7; zero where the special-function unit gives zero.
__device__ inline float exp2_polynomial(float x) {
  const float near = fmaxf(x, -126.f);
  const float shifted = near + 12582912.f; // 1.5 · 2^23: the nearest integer ends up in the low bits
  const float f = near - (shifted - 12582912.f);
  float p = 1.32764445e-3f;
  p = fmaf(p, f, 9.67553724e-3f);
  p = fmaf(p, f, 5.55071346e-2f);
  p = fmaf(p, f, 2.40221202e-1f);
  p = fmaf(p, f, 6.93146944e-1f);
  p = fmaf(p, f, 1.00000012f);
  return x < -126.f ? 0.f : float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// One exponential in eight goes to the FMA pipes; docs/kernels/relation_kl.md derives the share. `position` is a
// constant after unrolling.
__device__ inline float exp2_shared(float x, int position) {
  return position % 8 == 7 ? exp2_polynomial(x) : exp2_special(x);
}

__device__ inline float sum_of_four_lanes(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

__device__ inline float max_of_four_lanes(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

__device__ inline float sum_of_warp(float value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    value += shuffle_xor(value, mask);
  }
  return value;
}

__device__ inline float max_of_warp(float value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    value = fmaxf(value, shuffle_xor(value, mask));
  }
  return value;
}

// Unscaled scores of 16 own rows and 8 kTiles other ones: own · otherᵀ. Exactly the transposed ones come out if the two
// change places: the gradient relies on it where scores are so large that a last bit of them decides a probability.
// `kSteps`: depth / 16 where it is known beforehand, else 1.
template <class Precision, int kTiles, int kSteps = 1>
__device__ inline void scores(float (&out)[kTiles][4], const char* own, int own_plane, const char* other,
                              int other_plane, int depth) {
  constexpr int kPlanes = Precision::kPlanes;
  // The products of plane a with plane b: a = b, a < b and a > b apart.
  constexpr int kParts = kPlanes == 1 ? 1 : 3;
  float parts[kParts][kTiles][4];
#pragma unroll
  for (int i = 0; i < kParts * kTiles * 4; ++i) {
    parts[i / (kTiles * 4)][i / 4 % kTiles][i % 4] = 0.f;
  }
  const int lane = thread() % 32, pitch = pitch_of(depth);
  const char* own_row = own + lane % 16 * pitch + lane / 16 * 16;
  const char* other_row = other + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
#pragma unroll kSteps
  for (int k = 0; k < 2 * depth; k += 32) {
    uint32_t a[kPlanes][4];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      load_matrices<false>(a[plane], own_row + plane * own_plane + k);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
#pragma unroll
      for (int b_plane = 0; b_plane < kPlanes; ++b_plane) {
        uint32_t b[4];
        load_matrices<false>(b, other_row + b_plane * other_plane + tile * 8 * pitch + k);
#pragma unroll
        for (int a_plane = 0; a_plane + b_plane < kPlanes; ++a_plane) {
          float(&sum)[kTiles][4] = parts[a_plane == b_plane ? 0 : a_plane < b_plane ? 1 : 2];
          Precision::multiply(sum[tile], a[a_plane], b[0], b[1]);
          Precision::multiply(sum[tile + 1], a[a_plane], b[2], b[3]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) {
    out[i / 4][i % 4] = parts[0][i / 4][i % 4];
    if constexpr (kPlanes > 1) {
      out[i / 4][i % 4] += parts[1][i / 4][i % 4] + parts[2][i / 4][i % 4];
    }
  }
}

// The left operand of a product from 16 x 16 results: two neighbouring tiles of `scores`.
template <class Precision>
__device__ inline void fragment_of(uint32_t (&planes)[Precision::kPlanes][4], const float (&left)[4],
                                   const float (&right)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float(&tile)[4] = i < 2 ? left : right;
    uint32_t parts[Precision::kPlanes];
    Precision::split(tile[i % 2 * 2], tile[i % 2 * 2 + 1], parts);
#pragma unroll
    for (int plane = 0; plane < Precision::kPlanes; ++plane) {
      planes[plane][i] = parts[plane];
    }
  }
}

// sums (16 x kWidth) += fragment (16 x 16) · 16 rows of shared memory, of which `depth` <= kWidth elements count.
template <class Precision, int kWidth>
__device__ inline void accumulate(float (&sums)[kWidth / 8][4], const uint32_t (&fragment)[Precision::kPlanes][4],
                                  const char* rows, int rows_plane, int depth) {
  const int lane = thread() % 32, pitch = pitch_of(depth);
  const char* row = rows + (lane / 8 % 2 * 8 + lane % 8) * pitch + lane / 16 * 16;
#pragma unroll
  for (int tile = 0; tile < kWidth / 8; tile += 2) {
    if (tile * 8 < depth) {
#pragma unroll
      for (int b_plane = 0; b_plane < Precision::kPlanes; ++b_plane) {
        uint32_t b[4];
        load_matrices<true>(b, row + b_plane * rows_plane + tile * 16);
#pragma unroll
        for (int a_plane = 0; a_plane + b_plane < Precision::kPlanes; ++a_plane) {
          Precision::multiply(sums[tile], fragment[a_plane], b[0], b[1]);
          Precision::multiply(sums[tile + 1], fragment[a_plane], b[2], b[3]);
        }
      }
    }
  }
}

} // namespace fastkd
