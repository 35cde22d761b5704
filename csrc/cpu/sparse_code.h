// A sparse-coded embedding table in memory, and how one of its rows is rebuilt. The formula stands in
// fastkd/ops/sparse_embedding.py, the arrays in fastkd/ops/sparse_arrays.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace fastkd {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Vec = at::vec::Vectorized<float>;

// Calls function(T()) with the C++ type of a dtype out of Types.
template <typename... Types, typename Function>
void with_type_of(c10::ScalarType dtype, const char* what, Function function) {
  const bool found = ((dtype == c10::CppTypeToScalarType<Types>::value ? (function(Types()), true) : false) || ...);
  TORCH_CHECK_TYPE(found, "sparse_embedding_cpp: ", what, " is ", dtype);
}

template <typename Function>
void with_type_of_rows(c10::ScalarType dtype, Function function) {
  with_type_of<float, c10::Half, c10::BFloat16, int8_t>(dtype, "kept", function);
}

template <typename Function>
void with_type_of_table(c10::ScalarType dtype, const char* what, Function function) {
  with_type_of<float, c10::Half, c10::BFloat16>(dtype, what, function);
}

// One vector of floats from numbers of any format.
inline Vec floats_at(const float* from) {
  return Vec::loadu(from);
}

template <typename T, std::enable_if_t<at::vec::is_reduced_floating_point_v<T>, int> = 0>
inline Vec floats_at(const T* from) {
  Vec values;
  at::vec::load_to_float(from, values);
  return values;
}

inline Vec floats_at(const int8_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  float values[Vec::size()];
  std::copy(from, from + Vec::size(), values);
  return Vec::loadu(values);
#endif
}

// function.template operator()<N>(column) for N vectors of columns at a time, and one column at a time where the width
// is less than a vector. The last vector overlaps its neighbour: `function` must write the same when called again.
template <typename Function>
void over_columns(int64_t width, Function function) {
  constexpr int64_t kSize = Vec::size();
  int64_t column = 0;
  for (; column + 8 * kSize <= width; column += 8 * kSize) {
    function(std::integral_constant<int, 8>(), column);
  }
  for (; column + kSize <= width; column += kSize) {
    function(std::integral_constant<int, 1>(), column);
  }
  if (column < width && width >= kSize) {
    function(std::integral_constant<int, 1>(), width - kSize);
  } else {
    for (; column < width; ++column) {
      function(std::integral_constant<int, 0>(), column);
    }
  }
}

// The sum over all columns of what vectors(column) gives for a vector of them, and scalars(column) for one behind.
template <typename Vectors, typename Scalars>
float sum_over_columns(int64_t width, Vectors vectors, Scalars scalars) {
  constexpr int64_t kSize = Vec::size();
  Vec sums[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  int64_t column = 0;
  for (; column + 4 * kSize <= width; column += 4 * kSize) {
    for (int i = 0; i < 4; ++i) { // an addition waits for the one before: four that do not
      sums[i] = sums[i] + vectors(column + i * kSize);
    }
  }
  for (; column + kSize <= width; column += kSize) {
    sums[0] = sums[0] + vectors(column);
  }
  float sum = at::vec::vec_reduce_all<float>(
      [](Vec a, Vec b) { return a + b; }, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; column < width; ++column) {
    sum += scalars(column);
  }
  return sum;
}

// Integers of one of two widths.
template <typename Narrow, typename Wide>
class Integers {
 public:
  explicit Integers(const Tensor& integers)
      : dense_(integers.contiguous()), data_(dense_.const_data_ptr()),
        wide_(dense_.scalar_type() == c10::CppTypeToScalarType<Wide>::value) {}

  int64_t operator[](int64_t i) const {
    return wide_ ? int64_t{static_cast<const Wide*>(data_)[i]} : int64_t{static_cast<const Narrow*>(data_)[i]};
  }

 private:
  Tensor dense_;
  const void* data_;
  bool wide_;
};

using Ids = Integers<int32_t, int64_t>;
using Indices = Integers<uint16_t, int32_t>;

// fp32, fp16 or int8 numbers; ones where there is no tensor.
class Numbers {
 public:
  explicit Numbers(const MaybeTensor& numbers)
      : dense_(numbers ? numbers->contiguous() : Tensor()), data_(numbers ? dense_.const_data_ptr() : nullptr),
        dtype_(numbers ? dense_.scalar_type() : at::kFloat) {}

  float operator[](int64_t i) const {
    if (!data_) {
      return 1.f;
    }
    return dtype_ == at::kFloat  ? static_cast<const float*>(data_)[i]
           : dtype_ == at::kHalf ? static_cast<float>(static_cast<const c10::Half*>(data_)[i])
                                 : static_cast<float>(static_cast<const int8_t*>(data_)[i]);
  }

 private:
  Tensor dense_;
  const void* data_;
  c10::ScalarType dtype_;
};

// Where a token's row comes from: kept rows and their weights, and the number of its coded row, -1 for a kept one.
struct Recipe {
  Recipe(int64_t atoms, int64_t width) : rows(std::max<int64_t>(atoms, 1)), weights(rows.size()), residual(width) {}

  int64_t coded = -1, count = 0;
  std::vector<int64_t> rows;
  std::vector<float> weights; // with the scales of both in them
  std::vector<float> residual; // room to decode it
};

class Code {
 public:
  // The arrays fit each other: fastkd/ops/sparse_arrays.py checks that.
  Code(const Tensor& slot, const Tensor& kept, const MaybeTensor& kept_scale, const Tensor& atom_ids,
       const Tensor& atom_weights, const MaybeTensor& weight_scale, const MaybeTensor& residual,
       const MaybeTensor& codebook)
      : num_embeddings(slot.size(0)), num_kept(kept.size(0)), num_coded(atom_ids.size(0)), atoms(atom_ids.size(1)),
        width(kept.size(1)), parts(residual ? residual->size(1) : 0), kept_dtype(kept.scalar_type()),
        kept_(kept.stride(1) == 1 || width == 1 ? kept : kept.contiguous()),
        rows_(static_cast<const char*>(kept_.const_data_ptr())), row_bytes_(width * kept_.element_size()),
        row_stride_(kept_.stride(0) * kept_.element_size()), slot_(slot), atom_ids_(atom_ids),
        kept_scale_(kept_scale), weights_(atom_weights), weight_scale_(weight_scale),
        residual_(residual ? residual->contiguous() : Tensor()),
        codebook_(codebook ? codebook->contiguous() : Tensor()) {}

  // Fills in the recipe of a token; false if the id, or an index that the code holds for it, is out of range.
  bool find(int64_t id, Recipe& recipe) const {
    if (id < 0 || id >= num_embeddings) {
      return false;
    }
    const int64_t place = slot_[id];
    if (place >= 0 && place < num_kept) {
      recipe.coded = -1;
      recipe.count = 1;
      recipe.rows[0] = place;
      recipe.weights[0] = kept_scale_[place];
      return true;
    }
    recipe.coded = place - num_kept;
    recipe.count = atoms;
    if (place < 0 || recipe.coded >= num_coded) {
      return false;
    }
    const float scale = weight_scale_[recipe.coded];
    for (int64_t a = 0; a < atoms; ++a) {
      const int64_t row = atom_ids_[recipe.coded * atoms + a];
      if (row < 0 || row >= num_kept) {
        return false;
      }
      recipe.rows[a] = row;
      recipe.weights[a] = weights_[recipe.coded * atoms + a] * scale * kept_scale_[row];
    }
    return true;
  }

  [[noreturn]] void throw_for(int64_t id) const {
    TORCH_CHECK_INDEX(id >= 0 && id < num_embeddings, "id ", id, " is out of range: the table has ", num_embeddings,
                      " rows");
    TORCH_CHECK_VALUE(false, "the code is damaged: what it holds for token ", id, " points outside its arrays");
  }

  template <typename T>
  const T* row(int64_t i) const {
    return reinterpret_cast<const T*>(rows_ + i * row_stride_);
  }

  float kept_scale(int64_t row) const {
    return kept_scale_[row];
  }

  // Asks for the head of every row that a later token needs; from there on the hardware follows by itself.
  void prefetch(const Recipe& recipe) const {
    for (int64_t a = 0; a < recipe.count; ++a) {
      const char* begin = row<char>(recipe.rows[a]);
      for (int64_t offset = 0; offset < std::min<int64_t>(row_bytes_, 256); offset += 64) {
        __builtin_prefetch(begin + offset, /*store*/ 0, /*locality*/ 3);
      }
    }
  }

  // Hands the row of the recipe over, in fp32: sink(vectors, column) with an array of vectors, or sink(number, column)
  // where there is no whole vector.
  template <typename Sink>
  void decode(Recipe& recipe, Sink sink) const {
    const bool quantised = recipe.coded >= 0 && parts > 0;
    if (quantised) {
      decode_residual(recipe.coded, recipe.residual.data());
    }
    with_type_of_rows(kept_dtype, [&](auto type) {
      accumulate<decltype(type)>(recipe, quantised ? recipe.residual.data() : nullptr, sink);
    });
  }

  const int64_t num_embeddings, num_kept, num_coded, atoms, width, parts;
  const c10::ScalarType kept_dtype;

 private:
  // start (zero where it is nullptr) + the weighted sum of kept rows.
  template <typename T, typename Sink>
  void accumulate(const Recipe& recipe, const float* start, Sink sink) const {
    constexpr int64_t kSize = Vec::size();
    over_columns(width, [&](auto vectors, int64_t column) {
      constexpr int kVectors = decltype(vectors)::value;
      if constexpr (kVectors == 0) {
        float sum = start ? start[column] : 0.f;
        for (int64_t a = 0; a < recipe.count; ++a) {
          sum += recipe.weights[a] * static_cast<float>(row<T>(recipe.rows[a])[column]);
        }
        sink(sum, column);
      } else {
        std::array<Vec, kVectors> sums;
        for (int i = 0; i < kVectors; ++i) {
          sums[i] = start ? Vec::loadu(start + column + i * kSize) : Vec(0.f);
        }
        for (int64_t a = 0; a < recipe.count; ++a) {
          const T* from = row<T>(recipe.rows[a]) + column;
          const Vec weight(recipe.weights[a]);
          for (int i = 0; i < kVectors; ++i) {
            sums[i] = at::vec::fmadd(weight, floats_at(from + i * kSize), sums[i]);
          }
        }
        sink(sums, column);
      }
    });
  }

  void decode_residual(int64_t coded, float* out) const {
    const int64_t size = width / parts;
    const uint8_t* codes = residual_.const_data_ptr<uint8_t>() + coded * parts;
    with_type_of<float, c10::Half>(codebook_.scalar_type(), "codebook", [&](auto type) {
      const auto* codebook = codebook_.const_data_ptr<decltype(type)>();
      for (int64_t part = 0; part < parts; ++part) {
        at::vec::convert(codebook + (part * 256 + codes[part]) * size, out + part * size, size);
      }
    });
  }

  const Tensor kept_;
  const char* const rows_;
  const int64_t row_bytes_, row_stride_;
  const Indices slot_, atom_ids_;
  const Numbers kept_scale_, weights_, weight_scale_;
  const Tensor residual_, codebook_;
};

template <size_t kVectors>
void store(float* to, const std::array<Vec, kVectors>& values) {
  for (size_t i = 0; i < kVectors; ++i) {
    values[i].store(to + i * Vec::size());
  }
}

inline void store(float* to, float value) {
  *to = value;
}

// A task should take a few microseconds, or the threads cost more than they save.
inline int64_t tokens_per_task(int64_t width) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1));
}

// The first token, in the order of ids, that cannot be looked up; found by many threads, raised by one.
class Fault {
 public:
  void at(int64_t token) {
    int64_t first = first_;
    while (token < first && !first_.compare_exchange_weak(first, token)) {
    }
  }

  std::optional<int64_t> token() const {
    const int64_t first = first_;
    return first == kNone ? std::nullopt : std::optional<int64_t>(first);
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_{kNone};
};

} // namespace
} // namespace fastkd
