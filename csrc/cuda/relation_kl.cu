// fastkd::relation_kl_cuda: the attention-relation KL and its student gradient on CUDA devices. The schema and the
// formulas stand in fastkd/ops/relation_kl.py. Only torch's ABI-stable headers: it compiles without a CUDA build of torch.

#include "warp.cuh"
#include "device_launcher.h"
#include "relation_kl_tensors.h"

namespace fastkd {
namespace {

std::tuple<Tensor, Tensor, Tensor> relation_kl(const Tensor& student, const MaybeTensor& student_right,
                                               const Tensor& teacher, const MaybeTensor& teacher_right,
                                               const Tensor& starts, const Tensor& lengths, const MaybeTensor& order,
                                               int64_t max_length, int64_t num_heads, bool causal, int64_t divisor,
                                               bool with_grad) {
  DeviceLauncher launcher(student.get_device_index(), "relation_kl");
  return relation_kl_on(launcher, student, student_right, teacher, teacher_right, starts, lengths, order, max_length,
                        num_heads, causal, divisor, with_grad);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("relation_kl_cuda", TORCH_BOX(&relation_kl));
}

} // namespace fastkd
