// Instructions for which CUDA C++ has no name: asynchronous copies into shared memory, and bf16 on the tensor cores, from
// sm_80 on. Not for nvcc, tests/kernels/cuda_on_cpu_ptx.h defines the same functions. Source: PTX ISA 9.0.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__

namespace m4ov {

// Starts to copy kBytes (4 or 16) into shared memory, of which the first `bytes` (0 to kBytes) come from `global` and the
// others are 0. Both addresses are multiples of kBytes, even where `bytes` is 0. Copies of 16 bytes pass by the L1; of
// the L2 they ask for the whole line. What is written can be read by this thread once copy_wait says so, and by the
// others after a barrier behind it.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 16, "what the instruction has");
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(place), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(place), "l"(global), "r"(bytes) : "memory");
  }
}

// Closes a group: this thread's copies since the group before.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups of this thread but the last kPending have arrived.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Keeps what was computed before a loop from being computed again inside, to save a register.
__device__ __forceinline__ void once(int& value) { asm volatile("" : "+r"(value)); }

// (value & mask) | bits in one instruction, which the compiler makes two of where both are constants.
__device__ __forceinline__ uint32_t masked_or(uint32_t value, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
  return result;
}

// Two bf16 in a register, the first in the low half: a · b + c, rounded once to nearest even.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// c [16, 8] += a [16, 16] · b [16, 8], by a whole warp: bf16, summed in float32. With g = lane / 4 and t = lane % 4, a
// lane holds, in the PTX ISA's layout of mma.m16n8k16,
//   a[0] = A[g, 2t .. 2t+1]      a[1] = A[g+8, 2t .. 2t+1]      b[0] = B[2t .. 2t+1, g]
//   a[2] = A[g, 2t+8 .. 2t+9]    a[3] = A[g+8, 2t+8 .. 2t+9]    b[1] = B[2t+8 .. 2t+9, g]
//   c[0 .. 1] = C[g, 2t .. 2t+1]     c[2 .. 3] = C[g+8, 2t .. 2t+1]
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace m4ov

#endif
