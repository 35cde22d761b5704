// Kernels launched on a device and its current stream, as every op's host code wants them. Only torch's ABI-stable headers.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace fastkd {
namespace {

// Makes `device` the current one for as long as it lives.
struct DeviceLauncher {
  torch::stable::accelerator::DeviceGuard guard;
  int shared_limit, processors; // bytes of shared memory that a block may have; multiprocessors
  cudaStream_t stream;

  // op: who needs compute capability 8.0, for the message.
  DeviceLauncher(int32_t device, const char* op) : guard(device) {
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    int generation = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device));
    STD_TORCH_CHECK(generation >= 8, op, "_cuda: this device has compute capability ", generation,
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

} // namespace
} // namespace fastkd
