// fastkd::attribution_distance_cuda for CPU tensors: csrc/cuda/ as it stands, from the schema's tensors down to the loads
// of a lane, run by warp_on_host.h.

#include "warp_on_host.h"

#include "../../csrc/cuda/attribution_distance_tensors.h"

namespace fastkd::attribution {
namespace {

struct HostLauncher {
  int processors = 1;
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

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { Op<&launcher_for>::register_in(m); }

} // namespace fastkd::attribution

// How many blocks run side by side, and where the random order of threads begins.
extern "C" void set_device(int processors, unsigned seed) { fastkd::attribution::settings = {processors, seed}; }

// The sequence whose scores are the job, or -1 minus the one whose gradients are.
extern "C" int64_t job(int64_t group, int64_t batch, int64_t window) {
  const auto [sequence, gradients] = fastkd::attribution::job_of(group, batch, window);
  return gradients ? -1 - sequence : sequence;
}
