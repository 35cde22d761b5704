// How the work is cut, and which kernel does it. Knows neither torch nor how a kernel is launched:
// attribution_distance.cu and the tests on the CPU give it a Launcher, which has
//
//     launch(kernel, blocks, threads, shared_bytes, arguments...)
//     processors                      of the device: how many blocks run side by side
#pragma once

#include <algorithm>
#include <type_traits>

#include "attribution_distance_jobs.cuh"

namespace fastkd::attribution {

constexpr int64_t kJobBytes = 24 * 1024; // of G and x

// Whether the rows of a token lie alike between multiples of 16 bytes in every tensor and class: then a run of one is a
// run of all.
inline bool in_step(const Call& call) {
  // The stride of a dimension of one is never taken.
  const auto even = [&](int64_t size, int64_t apart) { return size == 1 || apart % run_of(call.type) == 0; };
  const auto with = [&](const Rows& other) {
    const Rows& own = call.gradient;
    return other.data == nullptr ||
           ((reinterpret_cast<uintptr_t>(own.data) - reinterpret_cast<uintptr_t>(other.data)) % 16 == 0 &&
            even(call.batch, own.sequence - other.sequence) && even(call.classes, own.of_class - other.of_class) &&
            even(call.length, own.token - other.token));
  };
  const int64_t row = call.width, rows = call.length * row;
  return even(call.classes, call.gradient.of_class) && with(call.inputs) &&
         with({call.of_gradient, call.classes * rows, rows, row}) &&
         with({call.of_inputs, rows, 0, row});
}

// As many tokens for a warp as make a job of kJobBytes, but no more than leave work for every block that can run; and so
// many sequences ahead that half of the blocks that can run compute scores while the others write gradients.
inline void cut(Call& call, int64_t processors) {
  const int64_t blocks = processors * kBlocksAtOnce;
  const int64_t of_token = (call.classes + (call.inputs.data ? 1 : 0)) * call.width * bytes_of(call.type);
  const int64_t most = std::min(kJobBytes / (kWarps * of_token), call.batch * call.length / (kWarps * blocks));
  call.tokens = std::clamp<int64_t>(most, 1, 4);
  call.tiles = (call.length + kWarps * call.tokens - 1) / (kWarps * call.tokens);
  call.window = call.pull ? std::min(call.batch, (blocks / 2 + call.tiles - 1) / call.tiles + 1) : call.batch;
}

template <class Launcher, Form kForm>
void launch_as(Launcher& launcher, const Call& call, std::integral_constant<Form, kForm>) {
  const int64_t jobs = call.batch * call.tiles * (call.pull ? 2 : 1);
  const auto launch = [&](auto kernel) { launcher.launch(kernel, jobs, kThreads, 16, call); };
  if (!in_step(call)) {
    launch(distances<Type::kAny, kForm>);
  } else if (call.type == Type::kFp32) {
    launch(distances<Type::kFp32, kForm>);
  } else if (call.type == Type::kBf16) {
    launch(distances<Type::kBf16, kForm>);
  } else {
    launch(distances<Type::kFp16, kForm>);
  }
}

template <class Launcher>
void launch_distances(Launcher& launcher, Call call, bool summed) {
  cut(call, launcher.processors);
  if (!call.inputs.data) {
    launch_as(launcher, call, std::integral_constant<Form, Form::kSaliency>{});
  } else if (summed) {
    launch_as(launcher, call, std::integral_constant<Form, Form::kSum>{});
  } else {
    launch_as(launcher, call, std::integral_constant<Form, Form::kNorm>{});
  }
}

} // namespace fastkd::attribution
