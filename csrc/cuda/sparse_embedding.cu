// fastkd::sparse_embedding_cuda, its gradient and the embedding block on CUDA devices. Schemas and formulas stand in
// fastkd/ops/sparse_embedding.py. Only torch's ABI-stable headers: it compiles without a CUDA build of torch.

#include "warp.cuh"
#include "device_launcher.h"
#include "sparse_embedding_tensors.h"

namespace fastkd::sparse {
namespace {

DeviceLauncher launcher_for(const Tensor& ids) { return DeviceLauncher(ids.get_device_index(), "sparse_embedding"); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) { Ops<&launcher_for>::register_in(m); }

} // namespace fastkd::sparse
