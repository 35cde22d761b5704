// Around the sweeps: which sequence comes when, and the sum of what they leave behind.
#pragma once

#include "relation_kl_sweeps.cuh"

namespace fastkd {

constexpr int kScheduleThreads = 256;

// Sequences by falling length, in steps of 64 tokens, so that no long one is begun last; and the counters to zero. One
// block. Which of two sequences of a step comes first may change from run to run: no result depends on it.
__global__ void __launch_bounds__(kScheduleThreads) rank_sequences(Batch batch, int32_t* ranked, int32_t* counters) {
  auto* taken = reinterpret_cast<int32_t*>(shared_memory());
  const auto step_of = [&](int64_t sequence) {
    const int step = (batch.lengths[sequence] + 63) / 64;
    return step < kScheduleThreads ? kScheduleThreads - 1 - step : 0;
  };
  taken[thread()] = 0;
  barrier();
  for (int64_t i = thread(); i < batch.sequences; i += threads()) {
    take_next(&taken[step_of(i)]);
  }
  barrier();
  if (thread() == 0) {
    counters[0] = counters[1] = 0;
    int32_t before = 0;
    for (int step = 0; step < kScheduleThreads; ++step) {
      const int32_t count = taken[step];
      taken[step] = before;
      before += count;
    }
  }
  barrier();
  for (int64_t i = thread(); i < batch.sequences; i += threads()) {
    ranked[take_next(&taken[step_of(i)])] = static_cast<int32_t>(i);
  }
}

// A block per sequence: its blocks' divergences, always added in the same order.
__global__ void __launch_bounds__(kScheduleThreads) sequence_losses(Sweep sweep, float* losses) {
  const int64_t sequence = block();
  const int length = sweep.batch.lengths[sequence];
  const Place place = {sequence, sweep.batch.starts[sequence], 0,
                       length < sweep.batch.max_length ? length : sweep.batch.max_length};
  const float* partial = partial_of(sweep, place);
  const int count = (place.length + kOwnRows - 1) / kOwnRows;
  float sum = 0.f;
  for (int64_t i = thread(); i < static_cast<int64_t>(count) * sweep.batch.heads; i += threads()) {
    sum += partial[i / count * sweep.partial_head + i % count];
  }
  sum = sum_of_warp(sum);
  auto* reduced = reinterpret_cast<float*>(shared_memory());
  if (thread() % 32 == 0) {
    reduced[thread() / 32] = sum;
  }
  barrier();
  if (thread() == 0) {
    sum = 0.f;
    for (int warp = 0; warp < threads() / 32; ++warp) {
      sum += reduced[warp];
    }
    losses[sequence] = sum / (static_cast<float>(sweep.batch.heads) * (length > 1 ? length : 1));
  }
}

} // namespace fastkd
