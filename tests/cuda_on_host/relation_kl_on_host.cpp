// fastkd::relation_kl_cuda for CPU tensors: csrc/cuda/ as it stands, from the schema's tensors down to the fragments, run
// by warp_on_host.h.

#include "warp_on_host.h"

#include "../../csrc/cuda/relation_kl_tensors.h"

namespace fastkd {
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

std::tuple<Tensor, Tensor, Tensor> relation_kl(const Tensor& student, const MaybeTensor& student_right,
                                               const Tensor& teacher, const MaybeTensor& teacher_right,
                                               const Tensor& starts, const Tensor& lengths, const MaybeTensor& order,
                                               int64_t max_length, int64_t num_heads, bool causal, int64_t divisor,
                                               bool with_grad) {
  HostLauncher launcher = settings;
  return relation_kl_on(launcher, student, student_right, teacher, teacher_right, starts, lengths, order, max_length,
                        num_heads, causal, divisor, with_grad);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("relation_kl_cuda", TORCH_BOX(&relation_kl));
}

} // namespace fastkd

// The bytes of shared memory that a block may have, and where the random order of threads begins.
extern "C" void set_device(int shared_limit, unsigned seed) {
  fastkd::settings.shared_limit = shared_limit;
  fastkd::settings.seed = seed;
}
