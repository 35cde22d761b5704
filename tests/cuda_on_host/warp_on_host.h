// The names of csrc/cuda/warp.cuh for the CPU, so that g++ compiles the CUDA kernels as they stand and a test runs them.
//
// A block's threads are fibers of one thread. Each runs until it meets an instruction of the whole warp or a barrier;
// then another, drawn at random, goes on. An instruction of a warp takes place when all 32 lanes have arrived at it, and
// fails if they arrive at different ones. Shared memory begins as NaN, and has a fence behind it. A copy by copy_16
// takes place at once or when it is waited for, at random. So a missing barrier or wait shows as a wrong result under
// some seed, a lane that goes astray as an error.
//
// What this does not prove: anything about the memory model beyond that, races between blocks, registers, speed, and
// that the hardware's fragments lie as the PTX manual says they do.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

namespace fastkd {

using std::fmaf, std::fmaxf, std::fminf, std::log2f;

// Does what it does for all lanes of a warp at once; argument i is what lane i brought.
using WarpInstruction = void (*)(void* const* arguments);

struct Fiber {
  enum State { kReady, kAtInstruction, kAtBarrier, kDone };
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 * 1024);
  State state = kReady;
  WarpInstruction instruction = nullptr;
  void* argument = nullptr;
  std::vector<std::pair<void*, const void*>> copies;
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void run(const std::function<void()>& kernel, int64_t index, int64_t count, int threads, int shared_bytes, unsigned seed) {
    index_ = index, count_ = count, threads_ = threads, kernel_ = &kernel;
    random_.seed(seed);
    if (static_cast<int>(fibers_.size()) < threads) {
      fibers_.resize(threads);
    }
    constexpr int kFence = 4096;
    std::vector<uint32_t> shared((shared_bytes + kFence) / 4 + 4, 0xffffffffu);
    shared_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + 15) / 16 * 16);
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.state = Fiber::kReady;
      fiber.instruction = nullptr; // of a block that failed
      fiber.copies.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, begin, 0);
    }
    while (step()) {
    }
    for (char* at = shared_ + shared_bytes; at < reinterpret_cast<char*>(shared.data() + shared.size()); ++at) {
      if (*at != '\xff') {
        throw std::runtime_error("a thread wrote behind the end of shared memory");
      }
    }
  }

  void together(WarpInstruction instruction, void* argument) {
    fibers_[running_].instruction = instruction;
    fibers_[running_].argument = argument;
    leave(Fiber::kAtInstruction);
  }

  void leave(Fiber::State state) {
    fibers_[running_].state = state;
    swapcontext(&fibers_[running_].context, &scheduler_);
  }

  void fail(const std::string& message) {
    error_ = message;
    leave(Fiber::kDone);
  }

  void copy(void* to, const void* from) {
    fibers_[running_].copies.emplace_back(to, from);
    if (random_() % 2) {
      finish_copies();
    }
  }

  void finish_copies() {
    for (auto [to, from] : fibers_[running_].copies) {
      std::memcpy(to, from, 16);
    }
    fibers_[running_].copies.clear();
  }

  int thread() const { return running_; }
  int threads() const { return threads_; }
  int64_t index() const { return index_; }
  int64_t count() const { return count_; }
  char* shared() const { return shared_; }

 private:
  static void begin() {
    (*current().kernel_)();
    current().leave(Fiber::kDone);
  }

  // One warp goes on to its next instruction; false when all are done.
  bool step() {
    std::vector<int> ready;
    int done = 0, waiting = 0;
    for (int i = 0; i < threads_; ++i) {
      done += fibers_[i].state == Fiber::kDone;
      waiting += fibers_[i].state == Fiber::kAtBarrier;
      if (i % 32 == 0 && fibers_[i].state == Fiber::kReady) {
        ready.push_back(i);
      }
    }
    if (done == threads_) {
      return false;
    }
    if (ready.empty()) {
      if (waiting != threads_) {
        throw std::runtime_error("some threads wait at a barrier that others never reach");
      }
      for (int i = 0; i < threads_; ++i) {
        fibers_[i].state = Fiber::kReady;
      }
      return true;
    }
    const int first = ready[random_() % ready.size()];
    const int turn = random_() % 32;
    for (int i = 0; i < 32; ++i) {
      running_ = first + (i ^ turn);
      swapcontext(&scheduler_, &fibers_[running_].context);
      if (!error_.empty()) {
        throw std::runtime_error(std::exchange(error_, {}));
      }
    }
    void* arguments[32];
    for (int i = 0; i < 32; ++i) {
      Fiber& fiber = fibers_[first + i];
      if (fiber.state != fibers_[first].state || fiber.instruction != fibers_[first].instruction) {
        throw std::runtime_error("the lanes of a warp arrive at different instructions");
      }
      arguments[i] = fiber.argument;
    }
    if (fibers_[first].state == Fiber::kAtInstruction) {
      fibers_[first].instruction(arguments);
      for (int i = 0; i < 32; ++i) {
        fibers_[first + i].state = Fiber::kReady;
      }
    }
    return true;
  }

  ucontext_t scheduler_;
  std::vector<Fiber> fibers_;
  const std::function<void()>* kernel_ = nullptr;
  std::mt19937 random_;
  std::string error_;
  char* shared_ = nullptr;
  int64_t index_ = 0, count_ = 0;
  int threads_ = 0, running_ = 0;
};

inline int thread() { return Block::current().thread(); }
inline int threads() { return Block::current().threads(); }
inline int64_t block() { return Block::current().index(); }
inline int64_t blocks() { return Block::current().count(); }
inline char* shared_memory() { return Block::current().shared(); }

inline void barrier() {
  // A lane that comes to a barrier where its neighbours come to an instruction must not pass for one of them.
  Block::current().leave(Fiber::kAtBarrier);
}

inline int take_next(int* counter) { return (*counter)++; }

inline void copy_16(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
    Block::current().fail("copy_16 at an address that 16 does not divide");
  }
  Block::current().copy(to, from);
}
inline void wait_for_copies() { Block::current().finish_copies(); }

inline float shuffle_xor(float value, int mask) {
  struct Argument {
    float in, out;
    int mask;
  } argument = {value, 0.f, mask};
  Block::current().together(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* own = static_cast<Argument*>(lanes[i]);
          own->out = static_cast<Argument*>(lanes[i ^ own->mask])->in;
        }
      },
      &argument);
  return argument.out;
}

template <class T>
inline T shuffle(T value, int lane) {
  struct Argument {
    T in, out;
    int lane;
  } argument = {value, T{}, lane};
  Block::current().together(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* own = static_cast<Argument*>(lanes[i]);
          own->out = static_cast<Argument*>(lanes[own->lane])->in;
        }
      },
      &argument);
  return argument.out;
}

inline int arrive(int* counter) {
  shuffle(0, 0); // no lane is behind
  return shuffle(thread() % 32 == 0 ? (*counter)++ : 0, 0);
}

// Blocks run one after the other here, and what earlier ones bring has come: a wait for more would depend on a later block,
// and behind a wait for less there is work that nobody waits for.
inline void wait_until(const int* counter, int arrived) {
  if (*counter != arrived) {
    Block::current().fail("a warp waits for more or for less than earlier blocks bring");
  }
}

inline void fail(const char* what) { Block::current().fail(what); }

inline void require_aligned(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    Block::current().fail("a load or store at an address that its bytes do not divide");
  }
}
inline void load_16(uint32_t (&out)[4], const void* from) {
  require_aligned(from, 16);
  std::memcpy(out, from, 16);
}
inline void load_8(uint32_t (&out)[2], const void* from) {
  require_aligned(from, 8);
  std::memcpy(out, from, 8);
}
inline void store_16(void* to, const uint32_t (&words)[4]) {
  require_aligned(to, 16);
  std::memcpy(to, words, 16);
}
inline void store_8(void* to, const uint32_t (&words)[2]) {
  require_aligned(to, 8);
  std::memcpy(to, words, 8);
}

template <bool kTransposed>
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  struct Argument {
    const char* row;
    uint32_t* out;
  } argument = {static_cast<const char*>(row), out};
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    Block::current().fail("load_matrices at an address that 16 does not divide");
  }
  Block::current().together(
      [](void* const* lanes) {
        for (int i = 0; i < 128; ++i) {
          const int matrix = i % 4, g = i / 16, t = i / 4 % 4;
          uint16_t pair[2];
          for (int k = 0; k < 2; ++k) {
            const int source_row = kTransposed ? 2 * t + k : g, column = kTransposed ? g : 2 * t + k;
            std::memcpy(&pair[k], static_cast<Argument*>(lanes[matrix * 8 + source_row])->row + 2 * column, 2);
          }
          static_cast<Argument*>(lanes[i / 4])->out[matrix] = pair[0] | uint32_t{pair[1]} << 16;
        }
      },
      &argument);
}

inline uint32_t transposed(uint32_t pair) {
  struct Argument {
    uint32_t in, out;
  } argument = {pair, 0};
  Block::current().together(
      [](void* const* lanes) {
        const auto element = [&](int row, int column) {
          return static_cast<Argument*>(lanes[row * 4 + column / 2])->in >> (column % 2 * 16) & 0xffffu;
        };
        for (int i = 0; i < 32; ++i) {
          const int g = i / 4, t = i % 4;
          static_cast<Argument*>(lanes[i])->out = element(2 * t, g) | element(2 * t + 1, g) << 16;
        }
      },
      &argument);
  return argument.out;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen_bf16(uint32_t bits) { return float_of(bits << 16); }
inline float widen_fp16(uint32_t bits) {
  return c10::detail::fp16_ieee_to_fp32_value(static_cast<uint16_t>(bits));
}
inline uint32_t pack_bf16(float low, float high) {
  return c10::detail::round_to_nearest_even(low) | uint32_t{c10::detail::round_to_nearest_even(high)} << 16;
}
inline uint32_t pack_fp16(float low, float high) {
  return c10::detail::fp16_ieee_from_fp32_value(low) | uint32_t{c10::detail::fp16_ieee_from_fp32_value(high)} << 16;
}

template <float (*kWiden)(uint32_t)>
inline void multiply_16_bit(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Argument {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } argument = {c, a, {b0, b1}};
  Block::current().together(
      [](void* const* lanes) {
        float a[16][16], b[16][8];
        for (int i = 0; i < 32; ++i) {
          const auto* own = static_cast<Argument*>(lanes[i]);
          const int g = i / 4, t = i % 4;
          for (int k = 0; k < 8; ++k) { // element k of the eight in four registers
            a[g + k / 2 % 2 * 8][2 * t + k % 2 + k / 4 * 8] = kWiden(own->a[k / 2] >> (k % 2 * 16) & 0xffffu);
          }
          for (int k = 0; k < 4; ++k) {
            b[2 * t + k % 2 + k / 2 * 8][g] = kWiden(own->b[k / 2] >> (k % 2 * 16) & 0xffffu);
          }
        }
        for (int i = 0; i < 128; ++i) {
          const int row = i / 16 + i % 4 / 2 * 8, column = i / 4 % 4 * 2 + i % 2;
          float& sum = static_cast<Argument*>(lanes[i / 4])->c[i % 4];
          for (int k = 0; k < 16; ++k) {
            sum += a[row][k] * b[k][column];
          }
        }
      },
      &argument);
}
inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_16_bit<widen_bf16>(c, a, b0, b1);
}
inline void multiply_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_16_bit<widen_fp16>(c, a, b0, b1);
}

inline float exp2_special(float x) { return x < -126.f ? 0.f : std::exp2(x); }

} // namespace fastkd
