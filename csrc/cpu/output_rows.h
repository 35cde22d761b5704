// The rows of a result, written past the caches where it is large.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
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

  // One row of the result. A copy, in registers: behind a reference its members would be read again after every store.
  class Row {
   public:
    Row(T* to, int64_t width, bool streamed) : to_(to), width_(width), streamed_(streamed) {}

    void copy(const T* row) const {
      if (!streamed_) {
        std::memcpy(to_, row, width_ * sizeof(T));
        return;
      }
      for (int64_t column = 0; column < width_; column += kNumbers) {
        stream(to_ + column, at::vec::Vectorized<T>::loadu(row + column));
      }
    }

    // A vector of numbers from `column` on, or a single one.
    void put(int64_t column, at::vec::Vectorized<T> numbers) const {
      if (streamed_) {
        stream(to_ + column, numbers);
      } else {
        numbers.store(to_ + column);
      }
    }

    template <size_t kVectors>
    void put(int64_t column, const std::array<at::vec::Vectorized<T>, kVectors>& numbers) const {
      for (size_t i = 0; i < kVectors; ++i) {
        put(column + i * kNumbers, numbers[i]);
      }
    }

    void put(int64_t column, T number) const {
      to_[column] = number;
    }

    // The row = finish(values), a row of floats; finish(vector, column) and finish(number, column).
    template <typename Finish>
    void write(const float* values, Finish finish) const {
      constexpr int64_t kFloats = at::vec::Vectorized<float>::size();
      const auto finished = [&](int64_t column) {
        return finish(at::vec::Vectorized<float>::loadu(values + column), column);
      };
      int64_t column = 0;
      for (; column + kNumbers <= width_; column += kNumbers) {
        if constexpr (std::is_same_v<T, float>) {
          put(column, finished(column));
        } else {
          put(column, at::vec::convert_from_float<T>(finished(column), finished(column + kFloats)));
        }
      }
      for (; column < width_; ++column) {
        put(column, static_cast<T>(finish(values[column], column)));
      }
    }

   private:
    T* const to_;
    const int64_t width_;
    const bool streamed_;
  };

  Row operator[](int64_t i) const {
    return Row(rows_ + i * width_, width_, streamed_);
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
