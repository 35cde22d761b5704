// The embedding block around a token's row: position and type rows, and the LayerNorm. The formula stands in
// fastkd/ops/sparse_embedding.py.
#pragma once

#include <cmath>

#include "output_rows.h"
#include "sparse_code.h"

namespace fastkd {
namespace {

class Block {
 public:
  Block(const Tensor& ids, const MaybeTensor& type_ids, const MaybeTensor& position_ids, const Tensor& positions,
        const MaybeTensor& types, const Tensor& norm_weight, const Tensor& norm_bias, double eps)
      : length_(ids.size(-1)), width_(positions.size(1)), eps_(eps), positions_(positions.contiguous()),
        types_(types ? types->contiguous() : Tensor()), weight_(norm_weight.to(at::kFloat).contiguous()),
        bias_(norm_bias.to(at::kFloat).contiguous()) {
    if (position_ids) {
      position_ids_.emplace(*position_ids);
    }
    if (type_ids) {
      type_ids_.emplace(*type_ids);
    }
  }

  bool in_range(int64_t token) const {
    const int64_t p = position(token), t = type(token);
    return p >= 0 && p < positions_.size(0) && (!types_.defined() || (t >= 0 && t < types_.size(0)));
  }

  void check(int64_t token) const {
    const int64_t p = position(token), t = type(token);
    TORCH_CHECK_INDEX(p >= 0 && p < positions_.size(0), "position id ", p, " is out of range: the table has ",
                      positions_.size(0), " rows");
    TORCH_CHECK_INDEX(!types_.defined() || (t >= 0 && t < types_.size(0)), "token type id ", t,
                      " is out of range: the table has ", types_.defined() ? types_.size(0) : 0, " rows");
  }

  // Row `token` of the result, from the token's recipe; `x` has room for a row.
  template <typename Table, typename Out>
  void compute(const Code& code, Recipe& recipe, int64_t token, float* x, const OutputRows<Out>& rows) const {
    const Table* first = positions_.const_data_ptr<Table>() + position(token) * width_;
    const Table* second = types_.defined() ? types_.const_data_ptr<Table>() + type(token) * width_ : nullptr;
    code.decode(recipe, [&](auto value, int64_t column) {
      value = value + number_at<decltype(value)>(first + column);
      store(x + column, second ? value + number_at<decltype(value)>(second + column) : value);
    });
    const float mean = sum_over_columns(
        width_, [&](int64_t column) { return Vec::loadu(x + column); }, [&](int64_t column) { return x[column]; }) /
        static_cast<float>(width_);
    const float variance = sum_over_columns(
        width_,
        [&](int64_t column) {
          const Vec centred = Vec::loadu(x + column) - Vec(mean);
          return centred * centred;
        },
        [&](int64_t column) { return (x[column] - mean) * (x[column] - mean); }) / static_cast<float>(width_);
    normalise(x, mean, 1.f / std::sqrt(variance + static_cast<float>(eps_)), token, rows);
  }

 private:
  int64_t position(int64_t token) const {
    return position_ids_ ? (*position_ids_)[token] : token % length_;
  }

  int64_t type(int64_t token) const {
    return type_ids_ ? (*type_ids_)[token] : 0;
  }

  template <typename Out>
  void normalise(float* x, float mean, float factor, int64_t token, const OutputRows<Out>& rows) const {
    const float *weight = weight_.const_data_ptr<float>(), *bias = bias_.const_data_ptr<float>();
    rows.write(token, x, [&](auto value, int64_t column) {
      if constexpr (std::is_same_v<decltype(value), float>) {
        return (value - mean) * factor * weight[column] + bias[column];
      } else {
        return at::vec::fmadd((value - Vec(mean)) * Vec(factor), Vec::loadu(weight + column), Vec::loadu(bias + column));
      }
    });
  }

  const int64_t length_, width_;
  const double eps_;
  const Tensor positions_, types_, weight_, bias_;
  std::optional<Ids> position_ids_, type_ids_;
};

} // namespace
} // namespace fastkd
