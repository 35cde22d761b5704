// fastkd::cos_nce_cuda, its sums of unit vectors and its scaling on CUDA devices. Schemas and formulas stand in
// fastkd/ops/cos_nce.py. Only torch's ABI-stable headers: it compiles without a CUDA build of torch.

#include "warp.cuh"

#include <torch/csrc/stable/accelerator.h>

#include "cos_nce_tensors.h"

namespace fastkd::cosine {
namespace {

struct DeviceLauncher {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit DeviceLauncher(int32_t device) : guard(device) {
    int generation = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device));
    STD_TORCH_CHECK(generation >= 8, "cos_nce_cuda: this device has compute capability ", generation,
                    ".x; 8.0 or later is needed");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Arguments... arguments) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

DeviceLauncher launcher_for(const Tensor& x) { return DeviceLauncher(x.get_device_index()); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { Ops<&launcher_for>::register_in(m); }

} // namespace fastkd::cosine
