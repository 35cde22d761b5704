// Sums of unit vectors, over all samples and over those of each class; see fastkd/ops/cos_nce.py. Chunks of the samples
// follow from sizes alone and are added in their order: no atomics, and the same bits in every run.
#pragma once

#include "cos_nce_row.cuh"

namespace fastkd::cosine {

struct Sums {
  Vectors vectors;
  Mask mask;
  int64_t layers, samples, positions, width, classes;
  int64_t chunks, span; // samples are taken in chunks of `span`
  const int32_t* sorted; // classes in ascending order; null where the sum is over all samples
  const int64_t* order; // their samples
  const int64_t* begins; // where in that order each class begins, and the last one ends
  float* sums;
  // What runs that lie in several chunks come to in each of them: (layer, position, chunk, width), and where there are
  // classes (layer, position, chunk, 2, width), for a chunk's first run and its last.
  float* edges;

  __device__ int64_t edge(int64_t column, int64_t chunk, bool last_run) const {
    return ((column * chunks + chunk) * (sorted ? 2 : 1) + last_run) * width;
  }
};

constexpr int kBeginThreads = 256;

__global__ void __launch_bounds__(kBeginThreads) class_begins(const int32_t* sorted, int64_t samples, int64_t* begins,
                                                              int64_t classes) {
  const int64_t wanted = block() * threads() + thread();
  if (wanted <= classes) {
    int64_t begin = 0, end = samples;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      (sorted[middle] < wanted ? begin : end) = sorted[middle] < wanted ? middle + 1 : middle;
    }
    begins[wanted] = begin;
  }
}

// A block per chunk, layer and position, and per 32 · kColumns columns of a row wider than that. It adds run by run, a run
// being all samples, or in the sorted list those of one class; each warp takes every so manyth row of it.
template <Type kType, int kColumns>
__global__ void __launch_bounds__(256, kColumns <= 24 ? 3 : 1) run_sums(Sums call) {
  constexpr int kSpan = 32 * kColumns;
  constexpr int kRun = run_of(kType);
  const int64_t parts = (call.width + kSpan - 1) / kSpan;
  const int64_t own_part = block() % parts, at = block() / parts;
  const int64_t position = at % call.positions, chunk = at / call.positions % call.chunks;
  const int64_t layer = at / call.positions / call.chunks, column = layer * call.positions + position;
  const int warp = thread() / 32, warps = threads() / 32;
  auto* shared = reinterpret_cast<float*>(shared_memory()); // warps x kSpan
  const int64_t first = chunk * call.span;
  const int64_t last = first + call.span < call.samples ? first + call.span : call.samples;
  int64_t place = first;
  if (call.sorted && call.begins[0] > place) {
    place = call.begins[0]; // those before have no class
  }
  while (place < last) {
    int64_t begin = 0, end = call.samples, sum_at = 0;
    if (call.sorted) {
      const int64_t which = call.sorted[place];
      begin = call.begins[which], end = call.begins[which + 1], sum_at = 1 + which;
    }
    const int64_t stop = end < last ? end : last;
    float sum[kColumns] = {};
    for (int64_t row = place + warp; row < stop; row += warps) {
      const int64_t sample = call.sorted ? call.order[row] : row;
      if (!call.mask.holds(sample, position)) {
        continue;
      }
      const char* from = call.vectors.row(layer, sample, position);
      float x[kColumns], squares = 0.f;
      for (int64_t part = 0; part < parts; ++part) { // its own last
        Packed<kType, kColumns> packed;
        packed.load(from, (part + own_part + 1) % parts * kSpan, call.width, call.vectors.type);
        packed.widened(x, call.vectors.type);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          squares = fmaf(x[i], x[i], squares);
        }
      }
      const float inverse = inverse_norm(warp_sum(squares));
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        sum[i] = fmaf(x[i], inverse, sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      shared[warp * kSpan + Packed<kType, kColumns>::column(i / kRun) + i % kRun] = sum[i];
    }
    barrier();
    float* to = begin >= first && end <= last
                    ? call.sums + ((layer * (1 + call.classes) + sum_at) * call.positions + position) * call.width
                    : call.edges + call.edge(column, chunk, begin > first);
    for (int i = thread(); i < kSpan && own_part * kSpan + i < call.width; i += threads()) {
      float total = 0.f;
      for (int other = 0; other < warps; ++other) {
        total += shared[other * kSpan + i];
      }
      to[own_part * kSpan + i] = total;
    }
    barrier();
    place = stop;
  }
}

constexpr int kTotalThreads = 256;

// The sum over all samples, of its chunks: a block per layer, position and 32 columns.
__global__ void __launch_bounds__(kTotalThreads) total_of_all(Sums call) {
  const int64_t parts = (call.width + 31) / 32, column = block() / parts, at = block() % parts * 32 + thread() % 32;
  const int warp = thread() / 32, warps = threads() / 32;
  auto* shared = reinterpret_cast<float*>(shared_memory()); // warps x 32
  float sum = 0.f;
  if (at < call.width) {
#pragma unroll 8
    for (int64_t chunk = warp; chunk < call.chunks; chunk += warps) {
      sum += call.edges[call.edge(column, chunk, false) + at];
    }
  }
  shared[thread()] = sum;
  barrier();
  if (warp == 0 && at < call.width) {
    for (int other = 1; other < warps; ++other) {
      sum += shared[other * 32 + thread()];
    }
    const int64_t layer = column / call.positions, position = column % call.positions;
    call.sums[(layer * (1 + call.classes) * call.positions + position) * call.width + at] = sum;
  }
}

// A block per layer, class and position. The sum of a class within one chunk is there already.
__global__ void __launch_bounds__(kTotalThreads) totals_of_classes(Sums call) {
  const int64_t position = block() % call.positions, which = block() / call.positions % call.classes;
  const int64_t layer = block() / call.positions / call.classes;
  const int64_t begin = call.begins[which], end = call.begins[which + 1];
  const int64_t first = begin / call.span, last = (end + call.span - 1) / call.span;
  if (begin < end && last == first + 1) {
    return;
  }
  float* to = call.sums + ((layer * (1 + call.classes) + 1 + which) * call.positions + position) * call.width;
  for (int64_t at = thread(); at < call.width; at += threads()) {
    float sum = 0.f;
    for (int64_t chunk = first; begin < end && chunk < last; ++chunk) {
      sum += call.edges[call.edge(layer * call.positions + position, chunk, begin > chunk * call.span) + at];
    }
    to[at] = sum;
  }
}

} // namespace fastkd::cosine
