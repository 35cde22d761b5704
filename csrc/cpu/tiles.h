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

#include <algorithm>
#include <cstdint>

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

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

// c (m × n) = a (m × k) · b (k × n), added to c if `add`; row-major.
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
}

#else

template <int kRows>
void product_rows(int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                  bool add) {
  constexpr int kColumns = 8; // kRows × kColumns sums stay in the 16 registers of SSE and of NEON
  for (int64_t j = 0; j < n; j += kColumns) {
    float sums[kRows][kColumns] = {};
    for (int64_t l = 0; l < k; ++l) {
      for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
          sums[row][column] += a[row * lda + l] * b[l * ldb + j + column];
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        float& out = c[row * ldc + j + column];
        out = add ? out + sums[row][column] : sums[row][column];
      }
    }
  }
}

// The same for every other CPU, left to the compiler's vectoriser; n is a multiple of 16.
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    product_rows<4>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  }
  for (; i < m; ++i) {
    product_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  }
}

#endif

// dst (n × m) = transpose of src (m × n); both sides are multiples of 16.
inline void transpose(int64_t m, int64_t n, const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < m; i += 16) {
    for (int64_t j = 0; j < n; j += 16) {
      at::vec::transpose_mxn<float, 16, 16>(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst);
    }
  }
}

inline void add_transposed(int64_t m, int64_t n, const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  alignas(64) float block[16 * 16];
  for (int64_t i = 0; i < m; i += 16) {
    for (int64_t j = 0; j < n; j += 16) {
      at::vec::transpose_mxn<float, 16, 16>(src + i * ld_src + j, ld_src, block, 16);
      for (int64_t row = 0; row < 16; ++row) {
        for (int64_t lane = 0; lane < 16; lane += Vec::size()) {
          float* out = dst + (j + row) * ld_dst + i + lane;
          (Vec::loadu(out) + Vec::loadu(block + row * 16 + lane)).store(out);
        }
      }
    }
  }
}

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, x);
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
