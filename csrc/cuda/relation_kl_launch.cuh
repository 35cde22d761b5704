// Which kernels run, in which order and size. Knows neither torch nor how a kernel is launched: relation_kl.cu and the
// tests on the CPU give it a Launcher, which has
//
//     launch(kernel, blocks, threads, shared_bytes, arguments...)
//     shared_limit, processors        of the device: bytes a block may have, and how many blocks run side by side
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "relation_kl_gradient.cuh"
#include "relation_kl_resident.cuh"
#include "relation_kl_schedule.cuh"

namespace fastkd {

// One tensor of the schema; strides count elements.
struct Input {
  const void* data;
  int64_t row_stride, sequence_stride;
  int width;
  Type type;
};

struct Call {
  Input student, student_right, teacher, teacher_right; // the right ones are the left ones in a self relation
  const int64_t* starts;
  const int32_t* lengths;
  const int32_t* order;
  int64_t order_stride, sequences, rows, length; // rows of all sequences; length of a padded tensor, 0 if packed
  int max_length, heads;
  bool packed, cross, causal, with_grad;
  float weight; // 1 / (heads · divisor)
  float* losses;
  void *grad, *grad_right;
  float* stats; // 4 · heads · rows with a gradient
  float* partial; // heads · partial_slots()
  int32_t* schedule; // 2 + sequences · (1 + heads)

  int blocks() const { return (max_length + kOwnRows - 1) / kOwnRows; }
  int64_t partial_slots() const { return packed ? rows / kOwnRows + sequences : sequences * blocks(); }
};

// How two tensors whose rows meet in products lie in shared memory.
inline void lay_out(Operand& left, Operand& right, const Input& x, const Input& y, int heads, bool split) {
  const auto misplaced = [](const Input& t) {
    return (reinterpret_cast<uintptr_t>(t.data) % 2 + t.row_stride % 8 + t.sequence_stride % 8) != 0;
  };
  const uintptr_t first = reinterpret_cast<uintptr_t>(x.data) % 16;
  int window = 0;
  for (int head = 0; head < heads && head < 8; ++head) { // then the distances repeat
    window = std::max(window, static_cast<int>((first + 2 * x.width * static_cast<uintptr_t>(head)) % 16 / 2) + x.width);
  }
  const bool aligned = !split && !misplaced(x) && !misplaced(y) &&
                       reinterpret_cast<uintptr_t>(y.data) % 16 == first && window <= 128;
  const int depth = ((aligned ? window : x.width) + 15) / 16 * 16;
  int chunk_bits = 1;
  while (8 << chunk_bits < depth) {
    ++chunk_bits;
  }
  left = {x.data, x.row_stride, x.sequence_stride, x.width, depth, chunk_bits, x.type, aligned};
  right = {y.data, y.row_stride, y.sequence_stride, y.width, depth, chunk_bits, y.type, aligned};
}

template <class Precision, int kWidth, int kTeacherWidth, class Launcher>
bool launch_resident_as(Launcher& launcher, Sweep sweep) {
  const int max_length = sweep.batch.max_length, warps = (max_length + 63) / 64;
  const int shared = Resident<Precision, kWidth, kTeacherWidth>::bytes(max_length);
  if (32 * warps > resident_threads(kWidth) || shared > launcher.shared_limit) {
    return false;
  }
  sweep.own_s.depth = kWidth, sweep.own_s.chunk_bits = kWidth / 16;
  sweep.own_t.depth = kTeacherWidth, sweep.own_t.chunk_bits = kTeacherWidth == 16 ? 1 : 3;
  const int threads = max_length <= 128 ? 128 : std::max(256, 32 * warps);
  const int side_by_side = std::max(1, std::min(launcher.shared_limit / shared, resident_threads(kWidth) / threads));
  const int64_t grid = std::min(sweep.batch.sequences * sweep.batch.heads,
                                static_cast<int64_t>(side_by_side) * launcher.processors);
  launcher.launch(resident<Precision, kWidth, kTeacherWidth>, grid, threads, shared, sweep);
  return true;
}

// Runs where it can, and then leaves a note for the sweeps where to look for what it left over.
template <class Precision, class Launcher>
void launch_resident(Launcher& launcher, Sweep& sweep, bool cross, int32_t* pending) {
  const int depth_s = sweep.own_s.depth, depth_t = sweep.own_t.depth;
  if (cross || sweep.causal || depth_s > 32 || depth_t > 64) {
    return;
  }
  Sweep whole = sweep;
  whole.pending = pending;
  const bool ran = depth_s > 16   ? launch_resident_as<Precision, 32, 64>(launcher, whole)
                   : depth_t > 16 ? launch_resident_as<Precision, 16, 64>(launcher, whole)
                                  : launch_resident_as<Precision, 16, 16>(launcher, whole);
  if (ran) {
    sweep.pending = pending;
  }
}

template <class Precision, class Launcher>
void launch_sweeps(Launcher& launcher, const Call& call, Sweep sweep) {
  const auto bytes = [&](int stages) { return Tiles<Precision>::bytes(sweep.own_s.depth, sweep.own_t.depth, stages); };
  sweep.stage_twice = Precision::kPlanes == 1 && bytes(2) <= launcher.shared_limit;
  const int shared = bytes(sweep.stage_twice ? 2 : 1);
  if (shared > launcher.shared_limit) {
    throw std::runtime_error("relation heads of width " + std::to_string(sweep.own_s.width) + " and " +
                                std::to_string(sweep.own_t.width) + " take " + std::to_string(shared) +
                                " bytes of shared memory; this device has " + std::to_string(launcher.shared_limit));
  }
  const int64_t tasks = call.sequences * call.heads * sweep.blocks;
  // What the resident kernel leaves over is seldom anything: a few blocks look.
  const int64_t grid = sweep.pending ? std::min<int64_t>(tasks, 4 * launcher.processors) : std::min<int64_t>(tasks, 1 << 30);
  launcher.launch(row_sweep<Precision>, grid, kSweepThreads, shared, sweep);
  if (!call.with_grad) {
    return;
  }
  const auto launch_gradient = [&] {
    const auto kernel = sweep.own_s.depth <= 32   ? gradient_sweep<Precision, 32>
                        : sweep.own_s.depth <= 64 ? gradient_sweep<Precision, 64>
                                                  : gradient_sweep<Precision, 128>;
    launcher.launch(kernel, grid, kSweepThreads, shared, sweep);
  };
  sweep.as_rows = true, sweep.as_columns = !call.cross;
  launch_gradient();
  if (call.cross) {
    std::swap(sweep.own_s, sweep.other_s), std::swap(sweep.own_t, sweep.other_t);
    sweep.as_rows = false, sweep.as_columns = true, sweep.grad = call.grad_right;
    launch_gradient();
  }
}

// Throws std::runtime_error for relation heads that do not fit the device.
template <class Launcher>
void launch_relation_kl(Launcher& launcher, const Call& call) {
  const Type type = call.student.type;
  const bool split = type == Type::kFp32 || call.teacher.type != type;
  int32_t *counters = call.schedule, *ranked = counters + 2, *pending = ranked + call.sequences;
  const Batch batch = {call.starts, call.lengths,    call.order, call.order_stride, ranked, call.sequences,
                       call.max_length, call.heads, call.packed};
  launcher.launch(rank_sequences, 1, kScheduleThreads, 4 * kScheduleThreads, batch, ranked, counters);

  Sweep sweep = {};
  lay_out(sweep.own_s, sweep.other_s, call.student, call.student_right, call.heads, split);
  lay_out(sweep.own_t, sweep.other_t, call.teacher, call.teacher_right, call.heads, split);
  sweep.batch = batch;
  sweep.scale_s = 1.442695040888963f / std::sqrt(static_cast<float>(call.student.width));
  sweep.scale_t = 1.442695040888963f / std::sqrt(static_cast<float>(call.teacher.width));
  sweep.causal = call.causal;
  sweep.blocks = call.blocks();
  sweep.stats = call.with_grad ? call.stats : nullptr;
  sweep.stats_plane = call.heads * call.rows, sweep.stats_head = call.rows, sweep.stats_sequence = call.length;
  sweep.partial = call.partial;
  sweep.partial_head = call.partial_slots(), sweep.partial_sequence = call.packed ? 1 : call.blocks();
  sweep.grad = call.grad;
  sweep.grad_row = static_cast<int64_t>(call.heads) * call.student.width;
  sweep.grad_sequence = sweep.grad_row * call.length;
  sweep.grad_type = type;
  sweep.weight = call.weight;
  sweep.counters = counters;

  if (split) {
    launch_sweeps<Split>(launcher, call, sweep);
  } else if (type == Type::kBf16) {
    launch_resident<Bf16>(launcher, sweep, call.cross, pending);
    launch_sweeps<Bf16>(launcher, call, sweep);
  } else {
    launch_resident<Fp16>(launcher, sweep, call.cross, pending);
    launch_sweeps<Fp16>(launcher, call, sweep);
  }
  launcher.launch(sequence_losses, call.sequences, kScheduleThreads, 128, sweep, call.losses);
}

} // namespace fastkd
