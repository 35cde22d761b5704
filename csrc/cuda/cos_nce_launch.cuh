// Which kernels run, in which order and size. Knows neither torch nor how a kernel is launched: cos_nce.cu and the tests
// on the CPU give it a Launcher, which has
//
//     launch(kernel, blocks, threads, shared_bytes, arguments...)
#pragma once

#include <algorithm>
#include <type_traits>

#include "cos_nce_losses.cuh"
#include "cos_nce_sums.cuh"

namespace fastkd::cosine {

// Three blocks of eight warps for each of the 132 multiprocessors of an H200, or 16 of one warp. Not asked of the device:
// all add in the same order.
constexpr int64_t kBlocksOfAll = 396, kBlocksOfClasses = 2112;

inline void take_chunks(Sums& call, int64_t most) {
  const int64_t columns = call.layers * call.positions;
  const int64_t chunks = std::max<int64_t>(1, std::min(most / columns, (call.samples + 15) / 16));
  call.span = (call.samples + chunks - 1) / chunks;
  call.chunks = (call.samples + call.span - 1) / call.span;
}

// Numbers that `edges` must hold.
inline int64_t edges_of(const Sums& call) {
  return call.chunks > 1 ? call.layers * call.positions * call.chunks * (call.sorted ? 2 : 1) * call.width : 0;
}

// Calls with the kernel's columns per lane, as a constant. Numbers that are read one by one have fewer kernels.
template <Type kType, class Call>
void with_columns(int64_t width, Call call) {
  if (width <= 256) {
    call(std::integral_constant<int, 8>{});
  } else if constexpr (kType == Type::kAny) {
    call(std::integral_constant<int, 32>{});
  } else {
    if (width <= 512) {
      call(std::integral_constant<int, 16>{});
    } else if (width <= 768) {
      call(std::integral_constant<int, 24>{});
    } else if (width <= 1024) {
      call(std::integral_constant<int, 32>{});
    } else {
      call(std::integral_constant<int, 64>{});
    }
  }
}

template <class Call>
void with_type(Type type, Call call) {
  if (type == Type::kFp32) {
    call(std::integral_constant<Type, Type::kFp32>{});
  } else if (type == Type::kBf16) {
    call(std::integral_constant<Type, Type::kBf16>{});
  } else if (type == Type::kFp16) {
    call(std::integral_constant<Type, Type::kFp16>{});
  } else {
    call(std::integral_constant<Type, Type::kAny>{});
  }
}

template <class Launcher>
void launch_runs(Launcher& launcher, const Sums& call) {
  with_type(call.vectors.in_runs ? call.vectors.type : Type::kAny, [&](auto type) {
    with_columns<type()>(call.width, [&](auto columns) {
      constexpr int kSpan = 32 * columns();
      const int threads = call.sorted ? 32 : columns() > 32 ? 128 : 256; // a class has few samples
      const int64_t parts = (call.width + kSpan - 1) / kSpan;
      launcher.launch(run_sums<type(), columns()>, call.layers * call.positions * call.chunks * parts, threads,
                      threads / 32 * kSpan * 4, call);
    });
  });
}

template <class Launcher>
void launch_sum_of_all(Launcher& launcher, const Sums& call) {
  launch_runs(launcher, call);
  if (call.chunks > 1) {
    launcher.launch(total_of_all, call.layers * call.positions * ((call.width + 31) / 32), kTotalThreads,
                    4 * kTotalThreads, call);
  }
}

template <class Launcher>
void launch_sums_of_classes(Launcher& launcher, const Sums& call, int64_t* begins) {
  launcher.launch(class_begins, call.classes / kBeginThreads + 1, kBeginThreads, 0, call.sorted, call.samples, begins,
                  call.classes);
  launch_runs(launcher, call);
  launcher.launch(totals_of_classes, call.layers * call.classes * call.positions, kTotalThreads, 0, call);
}

template <class Launcher>
void launch_rows(Launcher& launcher, const Losses& call) {
  const int64_t grid = call.layers * call.positions * ((call.samples + kRowsPerBlock - 1) / kRowsPerBlock);
  const bool alike = call.student.type == call.teacher.type && call.student.in_runs && call.teacher.in_runs;
  with_type(alike ? call.student.type : Type::kAny, [&](auto type) {
    if (call.width > (type() == Type::kAny ? 1024 : 2048)) {
      launcher.launch(rows<type(), 32, true>, grid, kLossThreads, 0, call);
      return;
    }
    with_columns<type()>(call.width, [&](auto columns) {
      launcher.launch(rows<type(), columns(), false>, grid, kLossThreads, 32 * columns() * 4, call);
    });
  });
}

template <class Launcher>
void launch_scale(Launcher& launcher, void* grad, const float* factor, int64_t elements, Type type) {
  const int64_t per_block = kScaleThreads * run_of(type);
  const int64_t grid = std::min<int64_t>((elements + per_block - 1) / per_block, 2112);
  with_type(type, [&](auto type) {
    if constexpr (type() != Type::kAny) {
      launcher.launch(scale<type()>, grid, kScaleThreads, 0, grad, factor, elements);
    }
  });
}

} // namespace fastkd::cosine
