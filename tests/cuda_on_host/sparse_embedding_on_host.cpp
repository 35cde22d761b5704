// fastkd::sparse_embedding_cuda, its gradient and the block for CPU tensors: csrc/cuda/ as it stands, from the schema's
// tensors down to the loads of a lane, run by warp_on_host.h.

#include "warp_on_host.h"

#include "../../csrc/cuda/sparse_embedding_tensors.h"

namespace fastkd::sparse {
namespace {

struct HostLauncher {
  int shared_limit = 0, processors = 1;
  unsigned seed = 0;

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Arguments... arguments) {
    for (int64_t index = 0; index < blocks; ++index) {
      Block::current().run([&] { kernel(arguments...); }, index, blocks, threads, shared_bytes, seed++);
    }
  }
};

HostLauncher settings;
HostLauncher launcher_for(const Tensor&) { return settings; }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { Ops<&launcher_for>::register_in(m); }

} // namespace fastkd::sparse

// The bytes of shared memory that a block may have, how many blocks run side by side, and where the random order of
// threads begins.
extern "C" void set_device(int shared_limit, int processors, unsigned seed) {
  fastkd::sparse::settings = {shared_limit, processors, seed};
}
