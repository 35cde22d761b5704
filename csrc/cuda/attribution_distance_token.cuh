// One token by one warp: its scores from G and x, and what both get once w is known; see
// fastkd/ops/attribution_distance.py. Which columns a lane has depends on the tensors alone, so the bits do too.
#pragma once

#include "cos_nce_row.cuh"

namespace fastkd::attribution {

using cosine::bytes_of, cosine::Mask, cosine::Packed, cosine::run_of, cosine::Type, cosine::warp_sum;

enum class Form { kNorm, kSum, kSaliency };
enum class Norm { kNone, kL1, kL2 };
enum class Kind { kL1, kL2, kSmoothL1 };

// A tensor (batch, classes, length, width); strides count elements, and the last is one.
struct Rows {
  const void* data; // null where there is none
  int64_t sequence, of_class, token;

  __device__ const char* at(int64_t b, int64_t k, int64_t l, Type type) const {
    return static_cast<const char*>(data) + (b * sequence + k * of_class + l * token) * bytes_of(type);
  }
};

struct Call {
  Rows gradient, inputs; // x is the same for all classes
  Type type;
  Mask mask;
  const float* teacher; // (batch, classes, length), as are scores and pull
  int64_t batch, classes, length, width;
  Norm norm;
  Kind kind;
  bool weighted;
  float *scores, *pull, *sums; // a; w, null where nobody wants a gradient; D / (B n)
  void *of_gradient, *of_inputs; // contiguous, null where nobody wants them
  int *taken, *arrived; // jobs that are taken; of each sequence warps that have come to their end. They begin at zero
  int64_t tokens, tiles, window; // of a warp; of a sequence; sequences whose scores run ahead

  __device__ int64_t place(int64_t b, int64_t k, int64_t l) const { return (b * classes + k) * length + l; }
};

// Numbers of one tensor that a lane holds at a time for the scores; half of them for the gradients, of which it writes as
// many. Read one by one they take an address each, and are fewer.
template <Type kType>
constexpr int kColumns = kType == Type::kAny ? 8 : 16;

// Gives `take(numbers, first, end)` every column of a row once: `numbers` are those of a lane that lie from `first` on
// and before `end`. Runs of 16 bytes; the numbers ahead of the first run and behind the last one by one.
template <Type kType, int kCount, class Take>
__device__ void for_each_span(const char* row, int64_t width, Take take) {
  int64_t head = 0, tail = width;
  if constexpr (kType != Type::kAny) {
    const int64_t to_run = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / bytes_of(kType);
    head = to_run < width ? to_run : width;
    tail = head + (width - head) / run_of(kType) * run_of(kType);
    if (head > 0 || tail < width) { // at most 14: a lane for each
      take(Packed<Type::kAny, 1>{}, thread() % 32 < head ? 0 : tail - head, width);
    }
  }
#pragma unroll 1
  for (int64_t first = head; first < tail; first += 32 * kCount) {
    take(Packed<kType, kCount>{}, first, tail);
  }
}

template <Type kType, Form kForm>
__device__ float score(const Call& call, int64_t b, int64_t k, int64_t l) {
  const char *row = call.gradient.at(b, k, l, call.type), *row_x = call.inputs.at(b, 0, l, call.type);
  float sum = 0.f;
  for_each_span<kType, kColumns<kType>>(row, call.width, [&](auto packed_g, int64_t first, int64_t end) {
    constexpr int kCount = packed_g.kRuns * packed_g.kRun;
    auto packed_x = packed_g;
    packed_g.load(row, first, end, call.type);
    if constexpr (kForm != Form::kSaliency) {
      packed_x.load(row_x, first, end, call.type);
    }
    float g[kCount], x[kCount];
    packed_g.widened(g, call.type), packed_x.widened(x, call.type);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float product = kForm == Form::kSaliency ? g[i] : g[i] * x[i];
      sum = kForm == Form::kSum ? sum + product : fmaf(product, product, sum);
    }
  });
  sum = warp_sum(sum);
  return kForm == Form::kSum ? sum : sqrtf(sum);
}

// Of all classes, and zeros where there is no token. All that a span needs is asked for before any of it is used.
template <Type kType, Form kForm>
__device__ void write_gradients(const Call& call, int64_t b, int64_t l) {
  const bool there = call.mask.holds(b, l);
  const char* row_x = call.inputs.at(b, 0, l, call.type);
  const int64_t row_bytes = call.width * bytes_of(call.type);
  const char* row = call.gradient.at(b, 0, l, call.type);
  for_each_span<kType, kColumns<kType> / 2>(row, call.width, [&](auto packed_x, int64_t first, int64_t end) {
    using Lane = decltype(packed_x);
    constexpr int kRun = Lane::kRun, kCount = Lane::kRuns * kRun;
    const auto store = [&](void* to, int64_t at_row, int run, const float(&values)[kRun]) {
      char* row = static_cast<char*>(to) + at_row * row_bytes;
      Lane::store(row, first + Lane::column(run), end, call.type, values);
    };
    if (kForm != Form::kSaliency && there) {
      packed_x.load(row_x, first, end, call.type);
    }
    float of_x[Lane::kRuns][kRun] = {};
#pragma unroll 1
    for (int64_t k = 0; k < call.classes; ++k) {
      const int64_t place = call.place(b, k, l);
      float w = 0.f, a = 0.f;
      Lane packed_g{};
      if (there) {
        packed_g.load(call.gradient.at(b, k, l, call.type), first, end, call.type);
        w = call.pull[place], a = call.scores[place];
      }
      const bool pulled = w != 0.f && (kForm == Form::kSum || a != 0.f); // else G and x may be anything
      const float by = 1.f / a; // times w alone it may overflow
      float g[kCount], x[kCount];
      packed_g.widened(g, call.type), packed_x.widened(x, call.type);
#pragma unroll
      for (int run = 0; run < Lane::kRuns; ++run) {
        float of_g[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int at = run * kRun + i;
          const float along = kForm == Form::kSum ? w : kForm == Form::kNorm ? g[at] * x[at] * by * w : g[at] * by * w;
          of_g[i] = !pulled ? 0.f : kForm == Form::kSaliency ? along : along * x[at];
          of_x[run][i] = pulled ? fmaf(along, g[at], of_x[run][i]) : of_x[run][i];
        }
        if (call.of_gradient) {
          store(call.of_gradient, place, run, of_g);
        }
      }
    }
#pragma unroll
    for (int run = 0; call.of_inputs && run < Lane::kRuns; ++run) {
      store(call.of_inputs, b * call.length + l, run, of_x[run]);
    }
  });
}

} // namespace fastkd::attribution
