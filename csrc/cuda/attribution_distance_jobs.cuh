// The one kernel, and the order of its work. A sequence is cut into tiles of tokens; a tile is two jobs, its scores and,
// later, its gradients, and a block does one job. The warp that ends a sequence's scores compares them.
//
//     scores of the sequences 0 ... window - 1, gradients of 0, scores of `window`, gradients of 1, ...
//
// So G and x are read for the second time while they still lie in the second-level cache, however large the batch is.
// Blocks take jobs in this order, whatever order they start in, and wait only for jobs that were taken before their own;
// of those the scores wait for nothing. So every wait ends, with any number of blocks at a time. What is counted across
// blocks is who has ended, never a sum: the bits are the same in every run and on every device.
#pragma once

#include "attribution_distance_compare.cuh"

namespace fastkd::attribution {

constexpr int kThreads = 128, kWarps = kThreads / 32, kBlocksAtOnce = 6; // blocks on a multiprocessor, by registers

struct Job {
  int64_t sequence;
  bool gradients;
};

// Of the tiles * group to tiles * (group + 1) - 1 th job.
__host__ __device__ inline Job job_of(int64_t group, int64_t batch, int64_t window) {
  if (group < window) {
    return {group, false};
  }
  const int64_t later = group - window;
  if (later < 2 * (batch - window)) {
    const bool gradients = later % 2 == 0;
    return {later / 2 + (gradients ? 0 : window), gradients};
  }
  return {group - batch, true};
}

template <Type kType, Form kForm>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) distances(Call call) {
  auto* taken = reinterpret_cast<int*>(shared_memory());
  if (thread() == 0) {
    *taken = take_next(call.taken);
  }
  barrier();
  const auto [b, gradients] = job_of(*taken / call.tiles, call.batch, call.window);
  const int64_t begin = *taken % call.tiles * kWarps * call.tokens + thread() / 32;
  const int64_t end = begin + kWarps * call.tokens < call.length ? begin + kWarps * call.tokens : call.length;
  const int warps = static_cast<int>(call.tiles * kWarps);
  int* arrived = call.arrived + b;
  if (gradients) {
    wait_until(arrived, warps + 1);
    for (int64_t l = begin; l < end; l += kWarps) {
      write_gradients<kType, kForm>(call, b, l);
    }
    return;
  }
  for (int64_t l = begin; l < end; l += kWarps) {
    for (int64_t k = 0; call.mask.holds(b, l) && k < call.classes; ++k) {
      const float a = score<kType, kForm>(call, b, k, l);
      if (thread() % 32 == 0) {
        call.scores[call.place(b, k, l)] = a;
      }
    }
  }
  if (arrive(arrived) == warps - 1) {
    for (int64_t k = 0; k < call.classes; ++k) {
      compare(call, b, k);
    }
    arrive(arrived);
  }
}

} // namespace fastkd::attribution
