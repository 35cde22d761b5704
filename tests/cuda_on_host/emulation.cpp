// Small kernels with and without a mistake, to see whether warp_on_host.h notices. Each returns how many values are wrong,
// or -1 where it was refused.

#include <exception>

#include "warp_on_host.h"

using namespace fastkd;

namespace {

constexpr int kThreads = 128, kBytes = 4096;

template <class Kernel>
int wrong_values(unsigned seed, Kernel kernel) {
  int wrong = 0;
  try {
    Block::current().run([&] { wrong += kernel(); }, 0, 1, kThreads, kBytes, seed);
  } catch (const std::exception&) {
    return -1;
  }
  return wrong;
}

} // namespace

// Every thread reads what a thread of the next warp wrote.
extern "C" int exchange(bool with_barrier, unsigned seed) {
  return wrong_values(seed, [&] {
    auto* shared = reinterpret_cast<int*>(shared_memory());
    shared[thread()] = thread();
    if (with_barrier) {
      barrier();
    }
    const int other = (thread() + 32) % threads();
    return int{shared[other] != other};
  });
}

extern "C" int copy(bool with_wait, unsigned seed) {
  alignas(16) int source[4 * kThreads];
  for (int i = 0; i < 4 * kThreads; ++i) {
    source[i] = i;
  }
  return wrong_values(seed, [&] {
    auto* shared = reinterpret_cast<int*>(shared_memory()) + 4 * thread();
    copy_16(shared, source + 4 * thread());
    if (with_wait) {
      wait_for_copies();
    }
    return int{shared[3] != 4 * thread() + 3};
  });
}

extern "C" int astray(bool divergent, unsigned seed) {
  return wrong_values(seed, [&] {
    if (divergent && thread() % 32 < 5) {
      barrier();
    }
    return int{shuffle_xor(1.f, 1) != 1.f};
  });
}

extern "C" int overrun(int bytes, unsigned seed) {
  return wrong_values(seed, [&] {
    shared_memory()[kBytes - 1 + bytes] = 0;
    return 0;
  });
}

// a (16 x 16) times b (16 x 8), both of small integers, each warp for itself; and the transposed of a transposed.
extern "C" int product(bool transposed_b, unsigned seed) {
  const auto a_of = [](int row, int k) { return static_cast<float>((3 * row + 5 * k) % 7 - 3); };
  const auto b_of = [](int k, int column) { return static_cast<float>((2 * k + column) % 5 - 2); };
  return wrong_values(seed, [&] {
    const int lane = thread() % 32, warp = thread() / 32;
    auto* a = reinterpret_cast<uint16_t*>(shared_memory()) + warp * 512;
    uint16_t* b = a + 256; // b by columns, or by rows if it is to be transposed on the way
    for (int i = lane; i < 256; i += 32) {
      a[i] = static_cast<uint16_t>(pack_bf16(a_of(i / 16, i % 16), 0.f));
      b[i] = static_cast<uint16_t>(pack_bf16(transposed_b ? b_of(i / 16, i % 16) : b_of(i % 16, i / 16), 0.f));
    }
    barrier();
    uint32_t of_a[4], of_b[4];
    load_matrices<false>(of_a, a + lane % 16 * 16 + lane / 16 * 8);
    if (transposed_b) {
      load_matrices<true>(of_b, b + (lane / 8 % 2 * 8 + lane % 8) * 16 + lane / 16 * 8);
    } else {
      load_matrices<false>(of_b, b + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
    }
    float c[4] = {};
    multiply_bf16(c, of_a, of_b[0], of_b[1]);
    int wrong = transposed(transposed(of_a[0])) != of_a[0];
    for (int i = 0; i < 4; ++i) {
      float expected = 0.f;
      for (int k = 0; k < 16; ++k) {
        expected += a_of(lane / 4 + i / 2 * 8, k) * b_of(k, lane % 4 * 2 + i % 2);
      }
      wrong += c[i] != expected;
    }
    return wrong;
  });
}

// Each block waits for those before it, and for `more` or fewer.
extern "C" int waiting(int more, unsigned seed) {
  int counter = 0, wrong = 0;
  for (int64_t block = 0; block < 3; ++block) {
    wrong |= wrong_values(seed, [&] {
      wait_until(&counter, static_cast<int>((block + more) * kThreads / 32));
      barrier();
      return int{arrive(&counter) / (kThreads / 32) != block};
    });
  }
  return wrong;
}
