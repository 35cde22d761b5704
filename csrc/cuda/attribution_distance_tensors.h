// From the schema's tensors (fastkd/ops/attribution_distance.py) to the kernel and back: allocation and options. Only
// torch's ABI-stable headers; which device computes is the launcher's affair.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "attribution_distance_launch.cuh"

HIDDEN_NAMESPACE_BEGIN(fastkd, attribution) // as torch's own Tensor is

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "attribution_distance_cuda takes float32, bfloat16 and float16 only");
  return type == ScalarType::Float ? Type::kFp32 : type == ScalarType::BFloat16 ? Type::kBf16 : Type::kFp16;
}

// An option of the schema, which is ours to free: the conversion to std::string in torch's header never frees its own.
inline std::string taken(StringHandle option) {
  const char* text = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(option, &text));
  TORCH_ERROR_CODE_CHECK(torch_string_length(option, &length));
  std::string made(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(option));
  return made;
}

template <class Value>
Value named(StringHandle option, std::initializer_list<std::pair<const char*, Value>> values) {
  const std::string name = taken(option);
  for (const auto& [known, value] : values) {
    if (name == known) {
      return value;
    }
  }
  STD_TORCH_CHECK(false, "attribution_distance_cuda does not know ", name);
}

template <class Launcher>
std::tuple<Tensor, Tensor, Tensor> distances_on(Launcher launcher, const Tensor& gradient, const MaybeTensor& inputs,
                                                const Tensor& teacher, const MaybeTensor& mask, bool weighted,
                                                bool summed, Norm norm, Kind kind, bool gradient_wanted,
                                                bool inputs_wanted) {
  using torch::stable::new_empty;
  Tensor sums = new_empty(gradient, {gradient.size(0), gradient.size(1)}, ScalarType::Float);
  Tensor of_gradient = gradient_wanted ? new_empty(gradient, gradient.sizes()) : new_empty(gradient, {0});
  Tensor of_inputs = inputs_wanted ? new_empty(gradient, inputs->sizes()) : new_empty(gradient, {0});
  if (gradient.numel() == 0) {
    torch::stable::zero_(of_inputs);
    return {torch::stable::zero_(sums), of_gradient, of_inputs};
  }
  Call call = {};
  call.gradient = {gradient.const_data_ptr(), gradient.stride(0), gradient.stride(1), gradient.stride(2)};
  if (inputs) {
    call.inputs = {inputs->const_data_ptr(), inputs->stride(0), 0, inputs->stride(1)};
  }
  if (mask) {
    call.mask = {static_cast<const uint8_t*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1)};
  }
  call.type = type_of(gradient), call.teacher = static_cast<const float*>(teacher.const_data_ptr());
  call.batch = gradient.size(0), call.classes = gradient.size(1);
  call.length = gradient.size(2), call.width = gradient.size(3);
  call.norm = norm, call.kind = kind, call.weighted = weighted;

  const int64_t numbers = call.batch * call.classes * call.length;
  const bool wanted = gradient_wanted || inputs_wanted;
  Tensor scores = new_empty(sums, {wanted ? 2 * numbers : numbers});
  Tensor counters = new_empty(sums, {1 + call.batch}, ScalarType::Int);
  torch::stable::zero_(counters);
  call.scores = static_cast<float*>(scores.mutable_data_ptr()), call.pull = wanted ? call.scores + numbers : nullptr;
  call.taken = static_cast<int*>(counters.mutable_data_ptr()), call.arrived = call.taken + 1;
  call.sums = static_cast<float*>(sums.mutable_data_ptr());
  call.of_gradient = gradient_wanted ? of_gradient.mutable_data_ptr() : nullptr;
  call.of_inputs = inputs_wanted ? of_inputs.mutable_data_ptr() : nullptr;
  launch_distances(launcher, call, summed);
  return {sums, of_gradient, of_inputs};
}

// The op on whatever device `kLauncherFor` opens for a tensor.
template <auto kLauncherFor>
struct Op {
  static std::tuple<Tensor, Tensor, Tensor> run(const Tensor& gradient, const MaybeTensor& inputs,
                                                const Tensor& teacher, const MaybeTensor& mask, bool weighted,
                                                StringHandle reduce, StringHandle norm, StringHandle kind,
                                                bool gradient_wanted, bool inputs_wanted) {
    const bool summed = named<bool>(reduce, {{"norm", false}, {"sum", true}});
    const Norm over = named<Norm>(norm, {{"none", Norm::kNone}, {"l1", Norm::kL1}, {"l2", Norm::kL2}});
    const Kind by = named<Kind>(kind, {{"l1", Kind::kL1}, {"l2", Kind::kL2}, {"smooth_l1", Kind::kSmoothL1}});
    return distances_on(kLauncherFor(gradient), gradient, inputs, teacher, mask, weighted, summed, over, by,
                        gradient_wanted, inputs_wanted);
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("attribution_distance_cuda", TORCH_BOX(&run));
  }
};

HIDDEN_NAMESPACE_END(fastkd, attribution)
