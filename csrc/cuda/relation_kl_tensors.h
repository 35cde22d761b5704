// From the schema's tensors (fastkd/ops/relation_kl.py) to a Call and back: allocation and checks. Only torch's
// ABI-stable headers; which device computes is the launcher's affair.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "relation_kl_launch.cuh"

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Input input_of(const Tensor& x, int64_t num_heads) {
  const int64_t last = x.dim() - 1;
  const Type type = x.scalar_type() == ScalarType::BFloat16 ? Type::kBf16
                    : x.scalar_type() == ScalarType::Half   ? Type::kFp16
                                                            : Type::kFp32;
  return {x.const_data_ptr(), x.stride(last - 1), x.dim() == 3 ? x.stride(0) : 0,
          static_cast<int>(x.size(last) / num_heads), type};
}

// The kernels write every row of a padded gradient, and of a packed one those that belong to a sequence.
inline Tensor new_gradient(const Tensor& of, bool wanted, bool all_written) {
  if (!wanted) {
    return torch::stable::new_empty(of, {0});
  }
  return all_written ? torch::stable::new_empty(of, of.sizes()) : torch::stable::new_zeros(of, of.sizes());
}

template <class Launcher>
std::tuple<Tensor, Tensor, Tensor> relation_kl_on(Launcher& launcher, const Tensor& student,
                                                  const MaybeTensor& student_right, const Tensor& teacher,
                                                  const MaybeTensor& teacher_right, const Tensor& starts,
                                                  const Tensor& lengths, const MaybeTensor& order, int64_t max_length,
                                                  int64_t num_heads, bool causal, int64_t divisor, bool with_grad) {
  const bool packed = student.dim() == 2, cross = student_right.has_value();
  const int64_t length = student.size(student.dim() - 2), rows = packed ? length : length * student.size(0);
  const Tensor starts_ = torch::stable::contiguous(starts), lengths_ = torch::stable::contiguous(lengths);

  Call call = {};
  call.student = input_of(student, num_heads), call.teacher = input_of(teacher, num_heads);
  call.student_right = cross ? input_of(*student_right, num_heads) : call.student;
  call.teacher_right = cross ? input_of(*teacher_right, num_heads) : call.teacher;
  call.starts = static_cast<const int64_t*>(starts_.const_data_ptr());
  call.lengths = static_cast<const int32_t*>(lengths_.const_data_ptr());
  if (order) {
    call.order = static_cast<const int32_t*>(order->const_data_ptr());
    call.order_stride = order->stride(0);
  }
  call.sequences = lengths.size(0), call.rows = rows, call.length = packed ? 0 : length;
  call.max_length = static_cast<int>(std::min(max_length, length)), call.heads = static_cast<int>(num_heads);
  call.packed = packed, call.cross = cross, call.causal = causal, call.with_grad = with_grad;
  call.weight = 1.f / static_cast<float>(num_heads * divisor);
  STD_TORCH_CHECK(std::max(call.student.width, call.teacher.width) <= 128, "relation_kl_cuda: relation heads are ",
                  call.student.width, " (student) and ", call.teacher.width, " (teacher) wide; up to 128 are allowed");

  const bool all_written = !packed && call.max_length == length;
  Tensor losses = torch::stable::new_empty(lengths, {call.sequences}, ScalarType::Float);
  Tensor grad = new_gradient(student, with_grad, all_written);
  Tensor grad_right = new_gradient(student, with_grad && cross, all_written);
  if (call.sequences == 0 || call.max_length == 0) {
    torch::stable::zero_(losses);
    return {losses, grad, grad_right};
  }
  const int64_t stats = with_grad ? 4 * num_heads * rows : 0, partial = num_heads * call.partial_slots();
  Tensor scratch = torch::stable::new_empty(lengths, {stats + partial}, ScalarType::Float);
  Tensor schedule = torch::stable::new_empty(lengths, {2 + call.sequences * (1 + num_heads)}, ScalarType::Int);
  call.losses = static_cast<float*>(losses.mutable_data_ptr());
  call.grad = grad.mutable_data_ptr(), call.grad_right = grad_right.mutable_data_ptr();
  call.stats = static_cast<float*>(scratch.mutable_data_ptr()), call.partial = call.stats + stats;
  call.schedule = static_cast<int32_t*>(schedule.mutable_data_ptr());
  launch_relation_kl(launcher, call);
  return {losses, grad, grad_right};
}

} // namespace fastkd
