// fastkd::cos_nce_cuda, its sums of unit vectors and its scaling on CUDA devices. Schemas and formulas stand in
// fastkd/ops/cos_nce.py. Only torch's ABI-stable headers: it compiles without a CUDA build of torch.

#include "warp.cuh"
#include "device_launcher.h"
#include "cos_nce_tensors.h"

namespace fastkd::cosine {
namespace {

DeviceLauncher launcher_for(const Tensor& x) { return DeviceLauncher(x.get_device_index(), "cos_nce"); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { Ops<&launcher_for>::register_in(m); }

} // namespace fastkd::cosine
