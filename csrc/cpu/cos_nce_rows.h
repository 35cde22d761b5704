// The vectors of cos_nce as rows in memory, and the sums over a row. The layout stands in fastkd/ops/cos_nce.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>

namespace fastkd {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();

// Calls function(T()) with the C++ type of the vectors.
template <typename Function>
void with_type_of_vectors(const Tensor& vectors, Function function) {
  switch (vectors.scalar_type()) {
    case at::kFloat:
      return function(float());
    case at::kBFloat16:
      return function(c10::BFloat16());
    case at::kHalf:
      return function(c10::Half());
    default:
      TORCH_CHECK_TYPE(false, "cos_nce_cpp takes float32, bfloat16 and float16, not ", vectors.scalar_type());
  }
}

// The rows of a tensor (M, N, L, D) whose last dimension is dense.
template <typename T>
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : first_(x.const_data_ptr<T>()), layer_(x.stride(0)), sample_(x.stride(1)), position_(x.stride(2)), width_(x.size(3)) {}

  const T* at(int64_t layer, int64_t sample, int64_t position) const {
    return first_ + layer * layer_ + sample * sample_ + position * position_;
  }

  // Asks for a row that will be read soon: the hardware looks ahead within a page only.
  void prefetch(int64_t layer, int64_t sample, int64_t position) const {
    const char* const row = reinterpret_cast<const char*>(at(layer, sample, position));
    for (int64_t offset = 0; offset < width_ * static_cast<int64_t>(sizeof(T)); offset += 64) {
      __builtin_prefetch(row + offset);
    }
  }

 private:
  const T* first_;
  int64_t layer_, sample_, position_, width_;
};

// Where a vector counts: everywhere without a mask.
class Valid {
 public:
  explicit Valid(const MaybeTensor& mask)
      : first_(mask ? mask->const_data_ptr<bool>() : nullptr),
        sample_(mask ? mask->stride(0) : 0),
        position_(mask ? mask->stride(1) : 0) {}

  bool operator()(int64_t sample, int64_t position) const {
    return !first_ || first_[sample * sample_ + position * position_];
  }

 private:
  const bool* first_;
  int64_t sample_, position_;
};

inline Vec floats_of(const float* from) {
  return Vec::loadu(from);
}

template <typename T>
Vec floats_of(const T* from) {
  Vec values;
  at::vec::load_to_float(from, values);
  return values;
}

// The first `count` of them, zeros behind.
inline Vec floats_of(const float* from, int64_t count) {
  return Vec::loadu(from, count);
}

template <typename T>
Vec floats_of(const T* from, int64_t count) {
  T padded[kLanes] = {};
  std::copy(from, from + count, padded);
  return floats_of(padded);
}

// Dot products over a row: products(load) gives their factors, where load(pointer) is the vector at the current column.
template <int kCount, typename Products>
std::array<float, kCount> dots(int64_t width, Products products) {
  std::array<Vec, kCount> even, odd; // an addition waits for the one before: two chains each
  even.fill(Vec(0.f));
  odd.fill(Vec(0.f));
  const auto add = [&](std::array<Vec, kCount>& sums, const std::array<std::pair<Vec, Vec>, kCount>& factors) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      sums[i] = at::vec::fmadd(factors[i].first, factors[i].second, sums[i]);
    }
  };
  int64_t column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
    add(even, products([&](auto* row) { return floats_of(row + column); }));
    add(odd, products([&](auto* row) { return floats_of(row + column + kLanes); }));
  }
  if (column + kLanes <= width) {
    add(even, products([&](auto* row) { return floats_of(row + column); }));
    column += kLanes;
  }
  if (column < width) {
    add(odd, products([&](auto* row) { return floats_of(row + column, width - column); }));
  }
  std::array<float, kCount> sums;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    sums[i] = at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, even[i] + odd[i]);
  }
  return sums;
}

// 1 / norm from the sum of squares; 0 for a norm up to 1e-8, and NaN, not 0, where the sum is infinite.
inline float inverse_norm(float squares) {
  return squares <= 1e-16f ? 0.f : 1.f / std::sqrt(squares) + 0.f * squares;
}

// sum += row / its norm
template <typename T>
void add_unit(const T* row, int64_t width, float* sum) {
  const auto [squares] = dots<1>(width, [&](auto load) {
    const Vec x = load(row);
    return std::array<std::pair<Vec, Vec>, 1>{{{x, x}}};
  });
  const Vec inverse(inverse_norm(squares));
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    at::vec::fmadd(floats_of(row + column), inverse, Vec::loadu(sum + column)).store(sum + column);
  }
  if (const int64_t rest = width - column; rest > 0) {
    at::vec::fmadd(floats_of(row + column, rest), inverse, Vec::loadu(sum + column, rest)).store(sum + column, rest);
  }
}

inline void add(const float* row, int64_t width, float* sum) {
  at::vec::map2<float>([](const Vec& a, const Vec& b) { return a + b; }, sum, sum, row, width);
}

// How rows are dealt out: blocks of neighbouring positions, whose sums (M, L, D) stay in a cache while samples pass by, and
// chunks of samples. It depends on the shape alone, so that results do not depend on the number of threads.
struct Partition {
  Partition(const Tensor& vectors, int64_t floats_of_a_block, int64_t least_chunk, int64_t most_chunks)
      : samples(vectors.size(1)), positions(vectors.size(2)) {
    constexpr int64_t kNumbersOfATask = 32768;
    const int64_t width = vectors.size(3);
    blocks = std::max<int64_t>(positions * width / floats_of_a_block, 1);
    block = (positions + blocks - 1) / blocks;
    chunks = std::clamp<int64_t>(samples * block * width / kNumbersOfATask, 1, most_chunks);
    chunk = std::max((samples + chunks - 1) / chunks, least_chunk);
    blocks = block ? (positions + block - 1) / block : 0;
    chunks = (samples + chunk - 1) / chunk;
    tasks = vectors.size(0) * blocks * chunks;
  }

  int64_t samples, positions, block, blocks, chunk, chunks, tasks;
};

// One task: a layer, and half-open ranges of samples and positions.
struct Task {
  Task(const Partition& of, int64_t index)
      : chunk(index % of.chunks),
        layer(index / of.chunks / of.blocks),
        first_sample(chunk * of.chunk),
        last_sample(std::min(first_sample + of.chunk, of.samples)),
        first_position(index / of.chunks % of.blocks * of.block),
        last_position(std::min(first_position + of.block, of.positions)) {}

  int64_t chunk, layer, first_sample, last_sample, first_position, last_position;
};

} // namespace
} // namespace fastkd
