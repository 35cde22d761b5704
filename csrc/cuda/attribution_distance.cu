// fastkd::attribution_distance_cuda on CUDA devices. Schema and formula stand in fastkd/ops/attribution_distance.py.
// Only torch's ABI-stable headers: it compiles without a CUDA build of torch.

#include "warp.cuh"
#include "device_launcher.h"
#include "attribution_distance_tensors.h"

namespace fastkd::attribution {
namespace {

DeviceLauncher launcher_for(const Tensor& x) { return DeviceLauncher(x.get_device_index(), "attribution_distance"); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { Op<&launcher_for>::register_in(m); }

} // namespace fastkd::attribution
