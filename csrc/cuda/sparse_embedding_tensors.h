// From the schema's tensors (fastkd/ops/sparse_embedding.py) to kernels and back: allocation, checks and the sort. Only
// torch's ABI-stable headers; which device computes is the launcher's affair.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "sparse_embedding_launch.cuh"

HIDDEN_NAMESPACE_BEGIN(fastkd, sparse) // as torch's own Tensor is

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
                      type == ScalarType::Char,
                  "sparse_embedding_cuda reads and writes float32, float16, bfloat16 and int8 only");
  return type == ScalarType::Float  ? Type::kFp32
         : type == ScalarType::Half ? Type::kFp16
         : type == ScalarType::Char ? Type::kInt8
                                    : Type::kBf16;
}

// What the kernels read lies without gaps; a copy that was made for that lives as long as this.
class Inputs {
 public:
  Integers integers(const Tensor& x) { return {pointer(x), static_cast<int>(x.element_size())}; }
  Integers integers(const MaybeTensor& x) { return x ? integers(*x) : Integers{}; }
  Numbers numbers(const Tensor& x) { return {pointer(x), type_of(x.scalar_type())}; }
  Numbers numbers(const MaybeTensor& x) { return x ? numbers(*x) : Numbers{}; }

  const void* pointer(const Tensor& x) {
    held_.push_back(torch::stable::contiguous(x));
    return held_.back().const_data_ptr();
  }

 private:
  std::vector<Tensor> held_;
};

// The arrays in the schema's order.
struct Arrays {
  const Tensor& slot;
  const Tensor& kept;
  const MaybeTensor& kept_scale;
  const Tensor& atom_ids;
  const Tensor& atom_weights;
  const MaybeTensor& weight_scale;
  const MaybeTensor& residual;
  const MaybeTensor& codebook;
};

inline Code code_of(Inputs& inputs, const Arrays& arrays) {
  Code code = {};
  code.slot = inputs.integers(arrays.slot), code.atom_ids = inputs.integers(arrays.atom_ids);
  code.kept = inputs.numbers(arrays.kept), code.kept_scale = inputs.numbers(arrays.kept_scale);
  code.atom_weights = inputs.numbers(arrays.atom_weights), code.weight_scale = inputs.numbers(arrays.weight_scale);
  code.codebook = inputs.numbers(arrays.codebook);
  if (arrays.residual) {
    code.residual = static_cast<const uint8_t*>(inputs.pointer(*arrays.residual));
    code.parts = static_cast<int>(arrays.residual->size(1));
  }
  code.tokens = arrays.slot.size(0), code.rows = arrays.kept.size(0), code.coded = arrays.atom_ids.size(0);
  code.width = static_cast<int>(arrays.kept.size(1)), code.atoms = static_cast<int>(arrays.atom_ids.size(1));
  return code;
}

inline Tensor new_rows(const Tensor& ids, const Tensor& kept, ScalarType dtype) {
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(kept.size(1));
  return torch::stable::new_empty(kept, shape, dtype);
}

template <class Launcher>
Tensor lookup_on(Launcher& launcher, const Tensor& ids, const Arrays& arrays, ScalarType dtype) {
  Tensor out = new_rows(ids, arrays.kept, dtype);
  if (out.numel() > 0) {
    Inputs inputs;
    launch_lookup(launcher, Lookup{code_of(inputs, arrays), inputs.integers(ids), ids.numel(), 1,
                                   out.mutable_data_ptr(), type_of(dtype)});
  }
  return out;
}

template <class Launcher>
Tensor embedding_block_on(Launcher& launcher, const Tensor& ids, const MaybeTensor& type_ids,
                          const MaybeTensor& position_ids, const Arrays& arrays, const Tensor& positions,
                          const MaybeTensor& types, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                          ScalarType dtype) {
  Tensor out = new_rows(ids, arrays.kept, dtype);
  if (out.numel() > 0) {
    Inputs inputs;
    BlockCall call = {};
    call.lookup = {code_of(inputs, arrays), inputs.integers(ids), ids.numel(), 1, out.mutable_data_ptr(), type_of(dtype)};
    call.type_ids = inputs.integers(type_ids), call.position_ids = inputs.integers(position_ids);
    call.length = ids.size(ids.dim() - 1), call.position_rows = positions.size(0);
    call.type_rows = types ? types->size(0) : 0;
    call.positions = inputs.numbers(positions), call.types = inputs.numbers(types);
    call.norm_weight = inputs.numbers(norm_weight), call.norm_bias = inputs.numbers(norm_bias);
    call.eps = static_cast<float>(eps);
    launch_embedding_block(launcher, call);
  }
  return out;
}

// The list in ascending order, equal ones as they stood, and where each stood.
inline std::pair<Tensor, Tensor> sorted(const Tensor& list) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(list), torch::stable::detail::from(std::optional(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  Tensor values = torch::stable::detail::to<Tensor>(stack[0]), places = torch::stable::detail::to<Tensor>(stack[1]);
  return {std::move(values), std::move(places)};
}

// Zero in every row that no token touches.
inline Tensor new_gradient(const Tensor& of, bool wanted) {
  STD_TORCH_CHECK(!wanted || of.scalar_type() != ScalarType::Char, "sparse_embedding_cuda: int8 has no gradient");
  return wanted ? torch::stable::new_zeros(of, of.sizes()) : torch::stable::new_empty(of, {0});
}

template <class Launcher>
std::tuple<Tensor, Tensor> backward_on(Launcher& launcher, const Tensor& upstream, const Tensor& ids,
                                       const Arrays& arrays, int64_t padding_idx, bool kept_wanted, bool weights_wanted) {
  Tensor d_kept = new_gradient(arrays.kept, kept_wanted), d_weights = new_gradient(arrays.atom_weights, weights_wanted);
  if (ids.numel() == 0) {
    return {d_kept, d_weights};
  }
  Inputs inputs;
  Backward call = {};
  call.code = code_of(inputs, arrays), call.ids = inputs.integers(ids);
  call.count = ids.numel(), call.padding_idx = padding_idx, call.slots = std::max(call.code.atoms, 1);
  const Numbers gradient = inputs.numbers(upstream);
  const int64_t total = call.count * call.slots;
  Tensor row_of = torch::stable::new_empty(ids, {total}, ScalarType::Int);
  Tensor weight_of = torch::stable::new_empty(ids, {total}, ScalarType::Float);
  Tensor coded_of = torch::stable::new_empty(ids, {call.count}, ScalarType::Int);
  call.row_of = static_cast<int32_t*>(row_of.mutable_data_ptr());
  call.weight_of = static_cast<float*>(weight_of.mutable_data_ptr());
  call.coded_of = static_cast<int32_t*>(coded_of.mutable_data_ptr());
  launch_contributions(launcher, call);
  if (d_kept.numel() > 0) {
    const auto [rows, places] = sorted(row_of);
    KeptGradient sums = {};
    sums.rows = static_cast<const int32_t*>(rows.const_data_ptr());
    sums.places = static_cast<const int64_t*>(places.const_data_ptr());
    sums.weight_of = call.weight_of, sums.total = total, sums.kept = call.code.rows;
    sums.slots = call.slots, sums.width = call.code.width, sums.upstream = gradient;
    Tensor partial = torch::stable::new_empty(ids, {sums.pieces(), 2, sums.width}, ScalarType::Float);
    sums.partial = static_cast<float*>(partial.mutable_data_ptr());
    sums.d_kept = d_kept.mutable_data_ptr(), sums.type = type_of(d_kept.scalar_type());
    launch_kept_gradient(launcher, sums);
  }
  if (d_weights.numel() > 0) {
    const auto [coded, tokens] = sorted(coded_of);
    launch_weight_gradient(launcher, WeightGradient{call.code, static_cast<const int32_t*>(coded.const_data_ptr()),
                                                    static_cast<const int64_t*>(tokens.const_data_ptr()), call.count,
                                                    gradient, d_weights.mutable_data_ptr(),
                                                    type_of(d_weights.scalar_type())});
  }
  return {d_kept, d_weights};
}

// The three ops of the schema on a launcher that `make(tensor)` gives for the tensor's device.
template <auto kMake>
struct Ops {
  static Tensor sparse_embedding(const Tensor& ids, const Tensor& slot, const Tensor& kept, const MaybeTensor& kept_scale,
                                 const Tensor& atom_ids, const Tensor& atom_weights, const MaybeTensor& weight_scale,
                                 const MaybeTensor& residual, const MaybeTensor& codebook, ScalarType dtype) {
    auto launcher = kMake(ids);
    return lookup_on(launcher, ids, {slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, residual, codebook},
                     dtype);
  }

  static std::tuple<Tensor, Tensor> sparse_embedding_backward(
      const Tensor& upstream, const Tensor& ids, const Tensor& slot, const Tensor& kept, const MaybeTensor& kept_scale,
      const Tensor& atom_ids, const Tensor& atom_weights, const MaybeTensor& weight_scale, const MaybeTensor& residual,
      const MaybeTensor& codebook, int64_t padding_idx, bool kept_wanted, bool weights_wanted) {
    auto launcher = kMake(ids);
    return backward_on(launcher, upstream, ids,
                       {slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, residual, codebook}, padding_idx,
                       kept_wanted, weights_wanted);
  }

  static Tensor embedding_block(const Tensor& ids, const MaybeTensor& type_ids, const MaybeTensor& position_ids,
                                const Tensor& slot, const Tensor& kept, const MaybeTensor& kept_scale,
                                const Tensor& atom_ids, const Tensor& atom_weights, const MaybeTensor& weight_scale,
                                const MaybeTensor& residual, const MaybeTensor& codebook, const Tensor& positions,
                                const MaybeTensor& types, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                                ScalarType dtype) {
    auto launcher = kMake(ids);
    return embedding_block_on(launcher, ids, type_ids, position_ids,
                              {slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, residual, codebook},
                              positions, types, norm_weight, norm_bias, eps, dtype);
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("sparse_embedding_cuda", TORCH_BOX(&Ops::sparse_embedding));
    m.impl("sparse_embedding_backward_cuda", TORCH_BOX(&Ops::sparse_embedding_backward));
    m.impl("embedding_block_cuda", TORCH_BOX(&Ops::embedding_block));
  }
};

HIDDEN_NAMESPACE_END(fastkd, sparse)
