// The rows of a result, written past the caches where it is large.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace fastkd {
namespace {

// An ordinary store first reads the line that it is about to overwrite, and drives something else out of the caches.
// From a few MiB on a result does not stay there anyway, and is faster without, its next reader included.
template <typename T>
class OutputRows {
 public:
  OutputRows(at::Tensor& out, int64_t width)
      : rows_(out.mutable_data_ptr<T>()), width_(width),
        streamed_(kCanStream && out.nbytes() >= 4 * 1024 * 1024 && width % kNumbers == 0) {}

  void copy(int64_t i, const T* row) const {
    T* to = rows_ + i * width_;
    if (!streamed_) {
      std::memcpy(to, row, width_ * sizeof(T));
      return;
    }
    for (int64_t column = 0; column < width_; column += kNumbers) {
      stream(to + column, at::vec::Vectorized<T>::loadu(row + column));
    }
  }

  // A vector of numbers of row i from `column` on, or a single one.
  void put(int64_t i, int64_t column, at::vec::Vectorized<T> numbers) const {
    T* to = rows_ + i * width_ + column;
    if (streamed_) {
      stream(to, numbers);
    } else {
      numbers.store(to);
    }
  }

  void put(int64_t i, int64_t column, T number) const {
    rows_[i * width_ + column] = number;
  }

  // Row i = finish(values), a row of floats; finish(vector, column) and finish(number, column).
  template <typename Finish>
  void write(int64_t i, const float* values, Finish finish) const {
    constexpr int64_t kFloats = at::vec::Vectorized<float>::size();
    const auto finished = [&](int64_t column) {
      return finish(at::vec::Vectorized<float>::loadu(values + column), column);
    };
    int64_t column = 0;
    for (; column + kNumbers <= width_; column += kNumbers) {
      if constexpr (std::is_same_v<T, float>) {
        put(i, column, finished(column));
      } else {
        put(i, column, at::vec::convert_from_float<T>(finished(column), finished(column + kFloats)));
      }
    }
    for (; column < width_; ++column) {
      put(i, column, static_cast<T>(finish(values[column], column)));
    }
  }

  // To be called by every thread behind its last row: streamed stores are not ordered otherwise.
  void flush() const {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    _mm_sfence();
#endif
  }

 private:
  static constexpr int64_t kNumbers = at::vec::Vectorized<T>::size();

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  static constexpr bool kCanStream = true;
#else
  static constexpr bool kCanStream = false;
#endif

  static void stream(T* to, at::vec::Vectorized<T> numbers) {
#if defined(CPU_CAPABILITY_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), std::bit_cast<__m512i>(numbers));
#elif defined(CPU_CAPABILITY_AVX2)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), std::bit_cast<__m256i>(numbers));
#else
    numbers.store(to);
#endif
  }

  T* rows_;
  int64_t width_;
  bool streamed_;
};

} // namespace
} // namespace fastkd
