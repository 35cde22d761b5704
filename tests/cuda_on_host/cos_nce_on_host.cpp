// fastkd::cos_nce_cuda and its companions for CPU tensors: csrc/cuda/ as it stands, from the schema's tensors down to the
// loads of a lane, run by warp_on_host.h.

#include "warp_on_host.h"

#include "../../csrc/cuda/cos_nce_tensors.h"

namespace fastkd::cosine {
namespace {

unsigned seed = 0;

struct HostLauncher {
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Arguments... arguments) {
    for (int64_t index = 0; index < blocks; ++index) {
      Block::current().run([&] { kernel(arguments...); }, index, blocks, threads, shared_bytes, seed++);
    }
  }
};

HostLauncher launcher_for(const Tensor&) { return {}; }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { Ops<&launcher_for>::register_in(m); }

} // namespace fastkd::cosine

// Where the random order of threads begins.
extern "C" void set_seed(unsigned seed) { fastkd::cosine::seed = seed; }
