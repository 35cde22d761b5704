// What the kernels ask of the hardware beyond C++, one function per instruction: everything else in this folder is
// written against these names. tests/cuda_on_host/ has the same names for the CPU, where the kernels are proved right.
//
// Fragments follow the PTX manual, "Matrix fragments for mma.m16n8k16": lane 4 g + t holds of the 16 x 8 result rows g
// and g + 8, columns 2 t and 2 t + 1, as {c[0], c[1]} and {c[2], c[3]}.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

namespace fastkd {

__device__ inline int thread() { return threadIdx.x; }
__device__ inline int threads() { return blockDim.x; }
__device__ inline int64_t block() { return blockIdx.x; }
__device__ inline int64_t blocks() { return gridDim.x; }

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ inline void barrier() { __syncthreads(); }

__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

template <class T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

__device__ inline int take_next(int* counter) { return atomicAdd(counter, 1); }

// Between warps of different blocks: this one has come so far, and what its lanes wrote is there for whoever sees the
// count. Returns the count before; the last to arrive sees what all have written.
__device__ inline int arrive(int* counter) {
  __syncwarp();
  int before = 0;
  if (threadIdx.x % 32 == 0) {
    __threadfence();
    before = atomicAdd(counter, 1);
    __threadfence();
  }
  before = __shfl_sync(0xffffffffu, before, 0);
  __syncwarp(); // a shuffle orders no memory
  return before;
}

// Until so many warps have arrived. They must be sure to run: blocks that wait may fill the device.
__device__ inline void wait_until(const int* counter, int arrived) {
  if (threadIdx.x % 32 == 0) {
    while (*static_cast<const volatile int*>(counter) < arrived) {
      __nanosleep(100);
    }
    __threadfence();
  }
  __syncwarp();
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8 m to 8 m + 7 give the addresses of the rows of matrix m. Lane 4 g + t
// gets of each the elements (g, 2 t) and (g, 2 t + 1); of the transposed matrices with `kTransposed`.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// The transposed of an 8 x 8 matrix held as two neighbouring elements per lane.
__device__ inline uint32_t transposed(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// c += a b, a 16 x 16, b 16 x 8, c in fp32.
__device__ inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to 16 bits each, the first in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ inline uint32_t pack_fp16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ inline float widen_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ inline float widen_fp16(uint32_t bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(static_cast<uint16_t>(bits)));
  return out;
}

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

// On the special-function unit, within two units in the last place; results below 2^-126 are zero.
__device__ inline float exp2_special(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// 16 bytes from global to shared memory, both aligned, not there before a wait.
__device__ inline void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 16 or 8 bytes of memory that no thread writes while the kernel runs; aligned.
__device__ inline void load_16(uint32_t (&out)[4], const void* from) {
  const uint4 words = __ldg(static_cast<const uint4*>(from));
  out[0] = words.x, out[1] = words.y, out[2] = words.z, out[3] = words.w;
}
__device__ inline void load_8(uint32_t (&out)[2], const void* from) {
  const uint2 words = __ldg(static_cast<const uint2*>(from));
  out[0] = words.x, out[1] = words.y;
}

// Stores of what the kernel does not read again: they make way in the cache for what it does.
__device__ inline void store_16(void* to, const uint32_t (&words)[4]) {
  __stcs(static_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
}
__device__ inline void store_8(void* to, const uint32_t (&words)[2]) {
  __stcs(static_cast<uint2*>(to), make_uint2(words[0], words[1]));
}

// A device assert: the kernel ends here, and the next call that waits for it raises.
__device__ inline void fail(const char* what) { __assert_fail(what, "fastkd", 0, "kernel"); }

} // namespace fastkd
