// From the schemas' tensors (fastkd/ops/cos_nce.py) to kernels and back: allocation and the sort. Only torch's ABI-stable
// headers; which device computes is the launcher's affair.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "cos_nce_launch.cuh"

HIDDEN_NAMESPACE_BEGIN(fastkd, cosine) // as torch's own Tensor is

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "cos_nce_cuda takes float32, bfloat16 and float16 only");
  return type == ScalarType::Float ? Type::kFp32 : type == ScalarType::BFloat16 ? Type::kBf16 : Type::kFp16;
}

inline Vectors vectors_of(const Tensor& x) {
  Vectors made = {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), type_of(x), true};
  const int64_t run = run_of(made.type);
  // The stride of a dimension of one is never taken.
  const auto even = [&](int dim) { return x.size(dim) == 1 || x.stride(dim) % run == 0; };
  made.in_runs = reinterpret_cast<uintptr_t>(made.data) % 16 == 0 && x.size(3) % run == 0 && even(0) && even(1) && even(2);
  return made;
}

inline Mask mask_of(const MaybeTensor& mask) {
  return mask ? Mask{static_cast<const uint8_t*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1)} : Mask{};
}

template <class T>
const T* data_of(const MaybeTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Values in ascending order, and where they stood.
inline std::pair<Tensor, Tensor> sorted(const Tensor& x) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(x), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

template <class Launcher>
Tensor sums_on(Launcher launcher, const Tensor& vectors, const MaybeTensor& mask, const MaybeTensor& classes,
               int64_t num_classes) {
  Sums call = {};
  call.vectors = vectors_of(vectors), call.mask = mask_of(mask);
  call.layers = vectors.size(0), call.samples = vectors.size(1), call.positions = vectors.size(2);
  call.width = vectors.size(3), call.classes = num_classes;
  Tensor out = torch::stable::new_empty(vectors, {call.layers, 1 + num_classes, call.positions, call.width},
                                        ScalarType::Float);
  if (vectors.numel() == 0) {
    return torch::stable::zero_(out);
  }
  call.sums = static_cast<float*>(out.mutable_data_ptr());
  {
    take_chunks(call, kBlocksOfAll);
    Tensor edges = torch::stable::new_empty(out, {edges_of(call)});
    call.edges = static_cast<float*>(edges.mutable_data_ptr());
    launch_sum_of_all(launcher, call);
  }
  if (num_classes > 0) {
    const auto [in_order, order] = sorted(*classes);
    Tensor begins = torch::stable::new_empty(order, {num_classes + 1});
    call.sorted = static_cast<const int32_t*>(in_order.const_data_ptr());
    call.order = static_cast<const int64_t*>(order.const_data_ptr());
    call.begins = static_cast<const int64_t*>(begins.const_data_ptr());
    take_chunks(call, kBlocksOfClasses);
    Tensor edges = torch::stable::new_empty(out, {edges_of(call)});
    call.edges = static_cast<float*>(edges.mutable_data_ptr());
    launch_sums_of_classes(launcher, call, static_cast<int64_t*>(begins.mutable_data_ptr()));
  }
  return out;
}

template <class Launcher>
std::tuple<Tensor, Tensor> losses_on(Launcher launcher, const Tensor& student, const Tensor& teacher,
                                     const Tensor& sums, const Tensor& counts, const MaybeTensor& mask,
                                     const MaybeTensor& excluded, bool own, const MaybeTensor& weights,
                                     int64_t divisor, bool with_grad) {
  Losses call = {};
  call.student = vectors_of(student), call.teacher = vectors_of(teacher), call.mask = mask_of(mask);
  call.sums = static_cast<const float*>(sums.const_data_ptr());
  call.counts = static_cast<const float*>(counts.const_data_ptr());
  call.excluded = data_of<int32_t>(excluded), call.weights = data_of<float>(weights);
  call.weight_stride = weights ? weights->stride(0) : 0;
  call.scale = 1.f / static_cast<float>(divisor), call.own = own, call.with_grad = with_grad;
  call.layers = student.size(0), call.samples = student.size(1), call.positions = student.size(2);
  call.width = student.size(3), call.classes = sums.size(1);
  Tensor losses = torch::stable::new_empty(student, {call.layers, call.samples, call.positions}, ScalarType::Float);
  Tensor grad = with_grad ? torch::stable::new_empty(student, student.sizes()) : torch::stable::new_empty(student, {0});
  if (student.numel() > 0) {
    call.losses = static_cast<float*>(losses.mutable_data_ptr()), call.grad = grad.mutable_data_ptr();
    launch_rows(launcher, call);
  }
  return {losses, grad};
}

// The three ops on whatever device `kLauncherFor` opens for a tensor.
template <auto kLauncherFor>
struct Ops {
  static Tensor sums(const Tensor& vectors, const MaybeTensor& mask, const MaybeTensor& classes, int64_t num_classes) {
    return sums_on(kLauncherFor(vectors), vectors, mask, classes, num_classes);
  }

  static std::tuple<Tensor, Tensor> losses(const Tensor& student, const Tensor& teacher, const Tensor& sums,
                                           const Tensor& counts, const MaybeTensor& mask, const MaybeTensor& excluded,
                                           bool own, const MaybeTensor& weights, int64_t divisor, bool with_grad) {
    return losses_on(kLauncherFor(student), student, teacher, sums, counts, mask, excluded, own, weights, divisor,
                     with_grad);
  }

  static void scale(const Tensor& grad, const Tensor& factor) {
    if (grad.numel() > 0) {
      auto launcher = kLauncherFor(grad);
      launch_scale(launcher, grad.mutable_data_ptr(), static_cast<const float*>(factor.const_data_ptr()), grad.numel(),
                   type_of(grad));
    }
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("cos_nce_sums_cuda", TORCH_BOX(&sums));
    m.impl("cos_nce_cuda", TORCH_BOX(&losses));
    m.impl("scale_gradient_cuda", TORCH_BOX(&scale));
  }
};

HIDDEN_NAMESPACE_END(fastkd, cosine)
