// From the scores of a sequence to its distances and to w, by one warp; see fastkd/ops/attribution_distance.py.
#pragma once

#include <cmath>

#include "attribution_distance_token.cuh"

namespace fastkd::attribution {

struct Apart {
  float each, slope; // φ and its derivative
};

__device__ inline float sign_of(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : 0.f; }

__device__ inline Apart apart(Kind kind, float z) {
  const float size = fabsf(z);
  if (kind == Kind::kL2) {
    return {z * z, 2.f * z};
  }
  if (kind == Kind::kSmoothL1 && size < 1.f) {
    return {0.5f * z * z, z};
  }
  return {kind == Kind::kL1 ? size : size - 0.5f, sign_of(z)};
}

__device__ inline void compare(const Call& call, int64_t b, int64_t k) {
  const int64_t first = call.place(b, k, 0);
  const float *scores = call.scores + first, *teacher = call.teacher + first;
  const auto for_each_token = [&](auto take) {
    for (int64_t l = thread() % 32; l < call.length; l += 32) {
      if (call.mask.holds(b, l)) {
        take(l, scores[l]);
      }
    }
  };
  float size = 0.f, says = 0.f, count = 0.f;
  for_each_token([&](int64_t l, float a) {
    size += call.norm == Norm::kL2 ? a * a : fabsf(a);
    says += teacher[l] != 0.f;
    count += 1.f;
  });
  size = warp_sum(size), says = warp_sum(says), count = warp_sum(count);
  if (call.norm != Norm::kL1) {
    size = call.norm == Norm::kL2 ? sqrtf(size) : 1.f;
  }
  const float inverse = size == 0.f ? 0.f : 1.f / size + 0.f * size; // an infinite size must not end as the inverse 0
  float sum = 0.f, along = 0.f;
  for_each_token([&](int64_t l, float a) {
    const auto [each, slope] = apart(call.kind, a * inverse - teacher[l]);
    sum += each;
    along = fmaf(slope, a * inverse, along);
  });
  sum = warp_sum(sum), along = warp_sum(along);
  const float weight = 1.f / (static_cast<float>(call.batch) * fmaxf(count, 1.f));
  const bool finite = sum - sum == 0.f;
  if (thread() % 32 == 0) {
    call.sums[b * call.classes + k] = says == 0.f ? 0.f : finite ? sum * weight : NAN;
  }
  if (call.pull) {
    const float by = says != 0.f && finite ? inverse * (call.weighted ? weight : 1.f) : 0.f;
    for_each_token([&](int64_t l, float a) {
      const float slope = apart(call.kind, a * inverse - teacher[l]).slope;
      const float turn = call.norm == Norm::kL2 ? a * inverse : call.norm == Norm::kL1 ? sign_of(a) : 0.f;
      call.pull[first + l] = by == 0.f ? 0.f : (slope - turn * along) * by;
    });
  }
}

} // namespace fastkd::attribution
