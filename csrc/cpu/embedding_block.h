// The embedding block around a token's row: position and type rows, and the LayerNorm. The formula stands in
// fastkd/ops/sparse_embedding.py.
#pragma once

#include <array>
#include <cmath>
#include <utility>

#include "output_rows.h"
#include "sparse_code.h"

namespace fastkd {
namespace {

// Mean and biased variance of a row, gathered while its vectors are in registers. Each lane has its own, about its first
// number: that is one of the lane's n, so the sum of squares loses at most a factor of n to rounding.
class Moments {
 public:
  template <size_t kVectors>
  void add(const std::array<Vec, kVectors>& values, int64_t column) {
    if (column == 0) {
      pivot_ = values[0];
    } else if (column % Vec::size() != 0) {
      return; // the last vector of an odd width: it overlaps its neighbour
    }
    Vec sum(0.f), squares(0.f);
    for (size_t i = 0; i < kVectors; ++i) {
      const Vec apart = values[i] - pivot_;
      sum = sum + apart;
      squares = at::vec::fmadd(apart, apart, squares);
    }
    sum_ = sum_ + sum;
    squares_ = squares_ + squares;
  }

  void add(float, int64_t) {}

  // Of the row x, whose vectors have been added.
  std::pair<float, float> of(const float* x, int64_t width) const {
    const int64_t in_lane = width / Vec::size();
    float mean = 0.f, squares = 0.f;
    if (in_lane > 0) {
      const auto plus = [](Vec a, Vec b) { return a + b; };
      const Vec shift = sum_ / Vec(in_lane), means = pivot_ + shift;
      mean = at::vec::vec_reduce_all<float>(plus, means) / Vec::size();
      const Vec apart = means - Vec(mean), own = squares_ - shift * sum_;
      squares = at::vec::vec_reduce_all<float>(plus, at::vec::fmadd(apart * apart, Vec(in_lane), own));
    }
    for (int64_t column = in_lane * Vec::size(); column < width; ++column) {
      const float apart = x[column] - mean;
      mean += apart / static_cast<float>(column + 1);
      squares += apart * (x[column] - mean);
    }
    return {mean, std::max(squares, 0.f) / static_cast<float>(width)};
  }

 private:
  Vec pivot_ = Vec(0.f), sum_ = Vec(0.f), squares_ = Vec(0.f);
};

class Block {
 public:
  Block(const Tensor& ids, const MaybeTensor& type_ids, const MaybeTensor& position_ids, const Tensor& positions,
        const MaybeTensor& types, const Tensor& norm_weight, const Tensor& norm_bias, double eps)
      : length_(ids.size(-1)), width_(positions.size(1)), num_positions_(positions.size(0)),
        num_types_(types ? types->size(0) : 0), eps_(eps),
        owned_{positions.contiguous(), types ? types->contiguous() : Tensor(), norm_weight.to(at::kFloat).contiguous(),
               norm_bias.to(at::kFloat).contiguous()},
        positions_(owned_[0].const_data_ptr()), types_(types ? owned_[1].const_data_ptr() : nullptr),
        weight_(owned_[2].const_data_ptr<float>()), bias_(owned_[3].const_data_ptr<float>()) {
    if (position_ids) {
      position_ids_.emplace(*position_ids);
    }
    if (type_ids) {
      type_ids_.emplace(*type_ids);
    }
  }

  bool in_range(int64_t token) const {
    const int64_t p = position(token), t = type(token);
    return p >= 0 && p < num_positions_ && (!types_ || (t >= 0 && t < num_types_));
  }

  void check(int64_t token) const {
    const int64_t p = position(token), t = type(token);
    TORCH_CHECK_INDEX(p >= 0 && p < num_positions_, "position id ", p, " is out of range: the table has ",
                      num_positions_, " rows");
    TORCH_CHECK_INDEX(!types_ || (t >= 0 && t < num_types_), "token type id ", t, " is out of range: the table has ",
                      num_types_, " rows");
  }

  // Row `token` of the result, from the token's recipe; `x` has room for a row. GCC would call a function for every few
  // vectors, were it not for the attribute: the row took twice as long.
  template <typename Table, typename Out>
  [[gnu::flatten]] void compute(const Code& code, Recipe& recipe, int64_t token, float* x,
                                const OutputRows<Out>& rows) const {
    const Table* first = static_cast<const Table*>(positions_) + position(token) * width_;
    const Table* second = types_ ? static_cast<const Table*>(types_) + type(token) * width_ : nullptr;
    Moments moments;
    code.decode(recipe, [&](auto values, int64_t column) {
      add(first + column, values);
      if (second) {
        add(second + column, values);
      }
      moments.add(values, column);
      store(x + column, values);
    });
    const auto [mean, variance] = moments.of(x, width_);
    const float factor = 1.f / std::sqrt(variance + static_cast<float>(eps_));
    rows[token].write(x, [=, weight = weight_, bias = bias_](auto value, int64_t column) {
      if constexpr (std::is_same_v<decltype(value), float>) {
        return (value - mean) * factor * weight[column] + bias[column];
      } else {
        return at::vec::fmadd((value - Vec(mean)) * Vec(factor), Vec::loadu(weight + column), Vec::loadu(bias + column));
      }
    });
  }

 private:
  int64_t position(int64_t token) const {
    return position_ids_ ? (*position_ids_)[token] : token % length_;
  }

  int64_t type(int64_t token) const {
    return type_ids_ ? (*type_ids_)[token] : 0;
  }

  template <typename Table, size_t kVectors>
  static void add(const Table* row, std::array<Vec, kVectors>& values) {
    for (size_t i = 0; i < kVectors; ++i) {
      values[i] = values[i] + floats_at(row + i * Vec::size());
    }
  }

  template <typename Table>
  static void add(const Table* row, float& value) {
    value += static_cast<float>(*row);
  }

  const int64_t length_, width_, num_positions_, num_types_;
  const double eps_;
  const std::array<Tensor, 4> owned_;
  const void *const positions_, *const types_;
  const float *const weight_, *const bias_;
  std::optional<Ids> position_ids_, type_ids_;
};

} // namespace
} // namespace fastkd
