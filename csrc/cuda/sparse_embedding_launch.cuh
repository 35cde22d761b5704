// Which kernels run, and in which size. Knows neither torch nor how a kernel is launched: sparse_embedding.cu and the tests
// on the CPU give it a Launcher, which has
//
//     launch(kernel, blocks, threads, shared_bytes, arguments...)
//     shared_limit, processors        of the device: bytes a block may have, and how many blocks run side by side
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "sparse_embedding_backward.cuh"

namespace fastkd::sparse {

constexpr int64_t kMostBlocks = 1 << 30; // a kernel goes on from there by itself

inline int64_t blocks_for(int64_t items) { return std::min((items + kWarps - 1) / kWarps, kMostBlocks); }

inline bool all_aligned(std::initializer_list<const void*> tables) {
  return std::all_of(tables.begin(), tables.end(),
                     [](const void* table) { return reinterpret_cast<uintptr_t>(table) % 16 == 0; });
}

// Gives `launch` the widest format for rows of this type: chunks cover a row, and every table begins on 16 bytes.
template <bool kIntegers, class Launch>
void with_format(Type type, int width, bool aligned, Launch launch) {
  if constexpr (kIntegers) {
    if (aligned && type == Type::kInt8 && width % 16 == 0) {
      return launch(std::type_identity<Packed<Type::kInt8, 16>>());
    }
    if (aligned && type == Type::kInt8 && width % 8 == 0) {
      return launch(std::type_identity<Packed<Type::kInt8, 8>>());
    }
  }
  if (aligned && type == Type::kFp32 && width % 4 == 0) {
    launch(std::type_identity<Packed<Type::kFp32, 4>>());
  } else if (aligned && type == Type::kFp16 && width % 8 == 0) {
    launch(std::type_identity<Packed<Type::kFp16, 8>>());
  } else if (aligned && type == Type::kBf16 && width % 8 == 0) {
    launch(std::type_identity<Packed<Type::kBf16, 8>>());
  } else {
    launch(std::type_identity<Single>());
  }
}

// Rounds of a warp over a row, each of one chunk per lane.
inline int rounds_of(int width, int columns) { return (width / columns + 31) / 32; }

template <class Launcher>
void launch_lookup(Launcher& launcher, Lookup call) {
  Code& code = call.code;
  const bool aligned = all_aligned({code.kept.data, code.codebook.data, call.out});
  with_format<true>(code.kept.type, code.width, aligned, [&](auto of) {
    using Format = typename decltype(of)::type;
    // Few tokens are cut in slices, until every processor has some warps to switch between.
    const int64_t wanted = (16 * int64_t{launcher.processors} + call.count - 1) / call.count;
    call.slices = static_cast<int>(std::clamp<int64_t>(wanted, 1, rounds_of(code.width, Format::kColumns)));
    code.wide_parts = code.parts > 0 && code.width / code.parts % Format::kColumns == 0;
    launcher.launch(lookup<Format>, blocks_for(call.count * call.slices), kThreads, 0, call);
  });
}

// Throws std::runtime_error for rows that do not fit the device.
template <class Launcher>
void launch_embedding_block(Launcher& launcher, BlockCall call) {
  Code& code = call.lookup.code;
  const bool aligned = all_aligned({code.kept.data, code.codebook.data, call.lookup.out, call.positions.data,
                                    call.types.data, call.norm_weight.data, call.norm_bias.data});
  with_format<true>(code.kept.type, code.width, aligned, [&](auto of) {
    using Format = typename decltype(of)::type;
    code.wide_parts = code.parts > 0 && code.width / code.parts % Format::kColumns == 0;
    const int64_t shared = int64_t{4} * kWarps * rounds_of(code.width, Format::kColumns) * 32 * Format::kColumns;
    if (shared > launcher.shared_limit) {
      throw std::runtime_error("embedding_block: rows of width " + std::to_string(code.width) + " take " +
                               std::to_string(shared) + " bytes of shared memory; this device has " +
                               std::to_string(launcher.shared_limit));
    }
    launcher.launch(embedding_block<Format>, blocks_for(call.lookup.count), kThreads, static_cast<int>(shared), call);
  });
}

template <class Launcher>
void launch_contributions(Launcher& launcher, const Backward& call) {
  const int64_t blocks = std::min((call.count * call.slots + kThreads - 1) / kThreads, kMostBlocks);
  launcher.launch(contributions, blocks, kThreads, 0, call);
}

template <class Launcher>
void launch_kept_gradient(Launcher& launcher, const KeptGradient& call) {
  const bool aligned = all_aligned({call.upstream.data, call.d_kept});
  with_format<false>(call.upstream.type, call.width, aligned, [&](auto of) {
    using Format = typename decltype(of)::type;
    const int64_t warps = call.pieces() * rounds_of(call.width, Format::kColumns);
    launcher.launch(kept_gradient<Format>, blocks_for(warps), kThreads, 0, call);
  });
  const bool wide = aligned && call.width % 4 == 0;
  launcher.launch(wide ? join<4> : join<1>, blocks_for(call.pieces() * rounds_of(call.width, wide ? 4 : 1)), kThreads, 0,
                  call);
}

template <class Launcher>
void launch_weight_gradient(Launcher& launcher, const WeightGradient& call) {
  const bool aligned = all_aligned({call.code.kept.data, call.upstream.data});
  with_format<true>(call.code.kept.type, call.code.width, aligned, [&](auto of) {
    launcher.launch(weight_gradient<typename decltype(of)::type>, blocks_for(call.count), kThreads, 0, call);
  });
}

} // namespace fastkd::sparse
