// Tiles: the unit in which every product, exponential and sum of a relation is computed.
//
// A tile is 64 × 64 fp32, row-major with leading dimension 64; at the end of a sequence it is smaller, its sides rounded
// up to a multiple of 16. brgemm compiles one kernel for every exact shape and thread and keeps it for good, so the
// few shapes that this leaves (four heights × four widths for each kind of product and head width) are what keeps
// memory flat over batches of any lengths.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>

namespace fastkd {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kTile = 64;
constexpr int64_t kArea = kTile * kTile;

inline int64_t padded(int64_t n) {
  return (n + 15) / 16 * 16;
}

inline int64_t tiles_of(int64_t n) {
  return (n + kTile - 1) / kTile;
}

// Hands out 64-byte aligned floats from one allocation. Without memory (nullptr) it only counts what would be needed.
class Arena {
 public:
  explicit Arena(float* memory) : memory_(memory) {}

  float* take(int64_t floats) {
    float* taken = memory_ ? memory_ + used_ : nullptr;
    used_ += padded(floats);
    return taken;
  }

  int64_t used() const {
    return used_;
  }

 private:
  float* memory_;
  int64_t used_ = 0;
};

#if defined(__AVX512BF16__)

constexpr bool kBf16Tiles = true;

// The same with b in pairs of rows: (k / 2 × n × 2).
inline void product(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/true);
}

#else

constexpr bool kBf16Tiles = false; // the CPU has no products of bf16: they go through fp32 tiles

#endif

// Says on a thread that no product follows: bf16 ones may have set up the CPU's matrix unit.
template <typename Element>
void end_products() {
  if constexpr (!std::is_same_v<Element, float>) {
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  }
}

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

// c (m × n) = a (m × k) · b (k × n), added to c if `add`; row-major.
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
}

#else

// The same for every other CPU, left to the compiler's vectoriser: four rows of b at a time are added to a row of c.
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* __restrict b, int64_t ldb,
                    float* __restrict c, int64_t ldc, bool add) {
  for (int64_t i = 0; i < m; ++i, a += lda, c += ldc) {
    if (!add) {
      std::fill_n(c, n, 0.f);
    }
    int64_t l = 0;
    for (; l + 4 <= k; l += 4) {
      const float* row = b + l * ldb;
      for (int64_t j = 0; j < n; ++j) {
        c[j] += a[l] * row[j] + a[l + 1] * row[ldb + j] + a[l + 2] * row[2 * ldb + j] + a[l + 3] * row[3 * ldb + j];
      }
    }
    for (; l < k; ++l) {
      for (int64_t j = 0; j < n; ++j) {
        c[j] += a[l] * b[l * ldb + j];
      }
    }
  }
}

#endif

// dst = transpose of a square block as wide as a vector.
inline void transpose_block(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  constexpr int kLanes = Vec::size();
  Vec rows[kLanes], mixed[kLanes];
#pragma GCC unroll kLanes
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = Vec::loadu(src + i * ld_src);
  }
  // Interleaving the first half of the rows with the second moves one bit of the row's number into the column's.
#pragma GCC unroll kLanes
  for (int bit = 1; bit < kLanes; bit *= 2) {
#pragma GCC unroll kLanes
    for (int i = 0; i < kLanes / 2; ++i) {
      std::tie(mixed[2 * i], mixed[2 * i + 1]) = at::vec::interleave2(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll kLanes
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = mixed[i];
    }
  }
#pragma GCC unroll kLanes
  for (int i = 0; i < kLanes; ++i) {
    rows[i].store(dst + i * ld_dst);
  }
}

// dst (n × m) = transpose of src (m × n); both sides are multiples of 16.
inline void transpose(int64_t m, int64_t n, const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < m; i += Vec::size()) {
    for (int64_t j = 0; j < n; j += Vec::size()) {
      transpose_block(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst);
    }
  }
}

inline void add_transposed(int64_t m, int64_t n, const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  alignas(64) float block[Vec::size() * Vec::size()];
  for (int64_t i = 0; i < m; i += Vec::size()) {
    for (int64_t j = 0; j < n; j += Vec::size()) {
      transpose_block(src + i * ld_src + j, ld_src, block, Vec::size());
      for (int64_t row = 0; row < Vec::size(); ++row) {
        float* out = dst + (j + row) * ld_dst + i;
        (Vec::loadu(out) + Vec::loadu(block + row * Vec::size())).store(out);
      }
    }
  }
}

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, x);
}

// Lane i = the sum of row i of a square block as wide as a vector. Interleaving halves the number of vectors, and moves one
// bit of the row's number into the lane's.
inline Vec sums_of_rows(const float* block) {
  constexpr int kLanes = Vec::size();
  Vec rows[kLanes];
#pragma GCC unroll kLanes
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = Vec::loadu(block + i * kLanes);
  }
#pragma GCC unroll kLanes
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll kLanes
    for (int i = 0; i < half; ++i) {
      const auto [low, high] = at::vec::interleave2(rows[i], rows[i + half]);
      rows[i] = low + high;
    }
  }
  return rows[0];
}

inline float largest_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); }, x);
}

// All bits set in the first `count` lanes (none for count <= 0, all for count >= Vec::size()), for use with `&`.
inline Vec first_lanes(int64_t count) {
  constexpr uint32_t kOn = 0xffffffffu;
  alignas(64) static constexpr uint32_t kLanes[32] = {kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn,
                                                      kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn};
  return Vec::loadu(kLanes + 16 - std::clamp<int64_t>(count, 0, 16));
}

// 2^x for x <= 0, relative error below 2e-7; below 2^-100 the result is 2^-100, which keeps denormals out of the
// products that follow and is far below the rounding of any row sum (each is at least one).
inline Vec exp2_of_negative(const Vec& x) {
  const Vec in_range = at::vec::clamp_min(x, Vec(-100.f));
  const Vec shifter(12582912.f); // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = in_range + shifter;
  const Vec fraction = in_range - (shifted - shifter);
  // Minimax polynomial for the relative error of 2^f on [-0.5, 0.5], held exact at 0.
  Vec power(1.3274633e-3f);
  power = at::vec::fmadd(power, fraction, Vec(9.6719619e-3f));
  power = at::vec::fmadd(power, fraction, Vec(5.5506784e-2f));
  power = at::vec::fmadd(power, fraction, Vec(2.4022235e-1f));
  power = at::vec::fmadd(power, fraction, Vec(6.9314706e-1f));
  power = at::vec::fmadd(power, fraction, Vec(1.f));
  using Ints = at::vec::Vectorized<int32_t>;
  const Ints exponent = at::vec::cast<int32_t, float>(shifted) << Ints(23);
  return at::vec::cast<float, int32_t>(at::vec::cast<int32_t, float>(power) + exponent);
}

} // namespace
} // namespace fastkd
