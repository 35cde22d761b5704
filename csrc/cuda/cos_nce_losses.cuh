// Losses, and the gradient while student and teacher are still in registers; see fastkd/ops/cos_nce.py.
#pragma once

#include "cos_nce_row.cuh"

namespace fastkd::cosine {

struct Losses {
  Vectors student, teacher;
  Mask mask;
  const float *sums, *counts; // (layers, classes, positions, width), (classes, positions), the first of `classes` being all
  const int32_t* excluded;
  const float* weights;
  int64_t weight_stride;
  float scale;
  bool own, with_grad;
  int64_t layers, samples, positions, width, classes;
  float* losses;
  void* grad;
};

constexpr int kLossThreads = 128, kRowsPerWarp = 4;
constexpr int kRowsPerBlock = kLossThreads / 32 * kRowsPerWarp;

// A run of a row of the sums, which like every row of theirs is made of runs where the student's are.
template <int kRun>
__device__ inline void load_floats(float (&out)[kRun], const float* row, int64_t at, int64_t width) {
  if constexpr (kRun == 1) {
    out[0] = at < width ? row[at] : 0.f;
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      uint32_t words[4] = {};
      if (at < width) {
        load_16(words, row + at + i);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        out[i + k] = float_of(words[k]);
      }
    }
  }
}

// A warp per row. The sum of the negatives lies in shared memory for the rows of a block, in the order in which lanes read
// it 16 bytes at a time. A row of more than 32 · kColumns columns is read twice, and the sum of the negatives with it.
template <Type kType, int kColumns, bool kWide>
__global__ void __launch_bounds__(kLossThreads) rows(Losses call) {
  using Lane = Packed<kType, kColumns>;
  constexpr int kSpan = 32 * kColumns, kRun = Lane::kRun, kRuns = Lane::kRuns, kPiece = kRun < 4 ? 1 : 4;
  const int64_t chunks = (call.samples + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t position = block() % call.positions, chunk = block() / call.positions % chunks;
  const int64_t layer = block() / call.positions / chunks;
  const int lane = thread() % 32;
  const float* sums = call.sums + (layer * call.classes * call.positions + position) * call.width;
  auto* shared = reinterpret_cast<float*>(shared_memory()); // kSpan
  if constexpr (!kWide) {
    for (int i = thread(); i < kSpan; i += threads()) {
      const int piece = i / kRun / 32 * (kRun / kPiece) + i % kRun / kPiece;
      shared[(piece * 32 + i / kRun % 32) * kPiece + i % kPiece] = i < call.width ? sums[i] : 0.f;
    }
    barrier();
  }

  const int64_t first = chunk * kRowsPerBlock;
  const int64_t last = first + kRowsPerBlock < call.samples ? first + kRowsPerBlock : call.samples;
  for (int64_t sample = first + thread() / 32; sample < last; sample += threads() / 32) {
    const int64_t row = (layer * call.samples + sample) * call.positions + position;
    char* grad_row = static_cast<char*>(call.grad) + row * call.width * bytes_of(call.student.type);
    const bool there = call.mask.holds(sample, position);
    float count = call.counts[position], own = call.own ? 1.f : 0.f;
    const float* of_class = nullptr;
    if (there && call.excluded && call.excluded[sample] >= 0) {
      const int64_t at = (1 + static_cast<int64_t>(call.excluded[sample])) * call.positions;
      of_class = sums + at * call.width;
      count -= call.counts[at + position], own = 0.f;
    } else {
      count -= own;
    }
    const char* row_s = call.student.row(layer, sample, position);
    const char* row_t = call.teacher.row(layer, sample, position);
    float s[kColumns] = {}, t[kColumns] = {};
    const auto load = [&](int64_t from) {
      if (!there) {
        return;
      }
      Lane packed_s, packed_t;
      packed_s.load(row_s, from, call.width, call.student.type);
      packed_t.load(row_t, from, call.width, call.teacher.type);
      packed_s.widened(s, call.student.type);
      packed_t.widened(t, call.teacher.type);
    };
    // The sum of the negatives without that of the row's class; the row's own vector comes off by `a`.
    const auto load_others = [&](float(&others)[kRun], int64_t from, int run) {
      const int64_t at = from + Lane::column(run);
      if constexpr (kWide) {
        load_floats(others, sums, at, call.width);
      } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          others[i] = shared[((run * (kRun / kPiece) + i / kPiece) * 32 + lane) * kPiece + i % kPiece];
        }
      }
      if (of_class) {
        float taken[kRun];
        load_floats(taken, of_class, at, call.width);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          others[i] -= taken[i];
        }
      }
    };

    float ss = 0.f, tt = 0.f, st = 0.f, so = 0.f;
    for (int64_t from = 0; from < (kWide ? call.width : 1); from += kSpan) {
      load(from);
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        float others[kRun];
        load_others(others, from, run);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float x = s[run * kRun + i], y = t[run * kRun + i];
          ss = fmaf(x, x, ss), tt = fmaf(y, y, tt), st = fmaf(x, y, st), so = fmaf(x, others[i], so);
        }
      }
    }
    ss = warp_sum(ss), tt = warp_sum(tt), st = warp_sum(st), so = warp_sum(so);

    // u = a t + h others
    const float inverse = inverse_norm(ss), h = count > 0.5f ? 0.5f / count : 0.f;
    const float a = -(1.5f + h * own) * inverse_norm(tt), along = (a * st + h * so) * inverse;
    if (lane == 0) {
      call.losses[row] = there ? 2.f + along : 0.f;
    }
    if (!call.with_grad) {
      continue;
    }
    const float weight = there && call.weights ? call.weights[sample * call.weight_stride] : 1.f;
    const float factor = inverse * call.scale * weight;
    for (int64_t from = 0; from < (kWide ? call.width : 1); from += kSpan) {
      if constexpr (kWide) {
        load(from);
      }
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        float others[kRun], grad[kRun];
        load_others(others, from, run);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int k = run * kRun + i;
          grad[i] = there ? (a * t[k] + h * others[i] - along * inverse * s[k]) * factor : 0.f;
        }
        Lane::store(grad_row, from + Lane::column(run), call.width, call.student.type, grad);
      }
    }
  }
}

constexpr int kScaleThreads = 256;

struct alignas(16) Quad { // load_16 is for memory that is not written
  uint32_t words[4];
};

// In place, and without touching memory where the factor is one.
template <Type kType>
__global__ void __launch_bounds__(kScaleThreads) scale(void* grad, const float* factor, int64_t elements) {
  constexpr int kRun = run_of(kType);
  const float by = *factor;
  if (by == 1.f) {
    return;
  }
  auto* rows = static_cast<char*>(grad);
  for (int64_t at = (block() * threads() + thread()) * kRun; at < elements; at += blocks() * threads() * kRun) {
    if (at + kRun <= elements) {
      const Quad quad = *reinterpret_cast<const Quad*>(rows + at * bytes_of(kType));
      float values[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const uint32_t word = quad.words[i * bytes_of(kType) / 4];
        values[i] = by * widen(kType == Type::kFp32 ? word : word >> (i % 2 * 16) & 0xffffu, kType);
      }
      Packed<kType, kRun>::store(rows, at, elements, kType, values);
    } else {
      for (int64_t i = at; i < elements; ++i) {
        store_one(rows, i, kType, by * widen(load_bits(rows, i, kType), kType));
      }
    }
  }
}

} // namespace fastkd::cosine
