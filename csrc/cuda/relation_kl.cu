// fastkd::relation_kl_cuda: the attention-relation KL and its student gradient on CUDA devices. The schema and the
// formulas stand in fastkd/ops/relation_kl.py. Only torch's ABI-stable headers: it compiles without a CUDA build of torch.

#include "warp.cuh"

#include <torch/csrc/stable/accelerator.h>

#include "relation_kl_tensors.h"

namespace fastkd {
namespace {

struct DeviceLauncher {
  int shared_limit, processors;
  cudaStream_t stream;

  explicit DeviceLauncher(int32_t device) {
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    int generation = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device));
    STD_TORCH_CHECK(generation >= 8, "relation_kl_cuda: this device has compute capability ", generation,
                    ".x; 8.0 or later is needed");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Arguments... arguments) {
    if (shared_bytes > 48 * 1024) { // more than a kernel may have unless it is told so
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

std::tuple<Tensor, Tensor, Tensor> relation_kl(const Tensor& student, const MaybeTensor& student_right,
                                               const Tensor& teacher, const MaybeTensor& teacher_right,
                                               const Tensor& starts, const Tensor& lengths, const MaybeTensor& order,
                                               int64_t max_length, int64_t num_heads, bool causal, bool with_grad) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  DeviceLauncher launcher(student.get_device_index());
  return relation_kl_on(launcher, student, student_right, teacher, teacher_right, starts, lengths, order, max_length,
                        num_heads, causal, with_grad);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("relation_kl_cuda", TORCH_BOX(&relation_kl));
}

} // namespace fastkd
