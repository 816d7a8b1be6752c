// Runs CUDA C++ on the CPU, one thread of a block after the other, so that index arithmetic, barriers and rounding of a
// kernel can be tested where there is no GPU. Threads are fibers that run up to their next barrier or shuffle; which
// warps get a turn, and in what order their threads take it, is drawn each time, so that warps drift apart and a missing
// barrier shows; so is the order of the blocks. A barrier or shuffle that not all threads reach ends the program (on a GPU
// it would be undefined). What it cannot show: races within a warp, memory ordering, speed.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) || (sizeof(T) == 16 && reinterpret_cast<uintptr_t>(p) % 16)) {
    fprintf(stderr, "misaligned load of %zu bytes\n", sizeof(T));
    abort();
  }
  return *p;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {

enum State { kRunnable, kWithWarp, kAtBarrier, kDone };

// What the 32 lanes of a warp do together once all have come; `operands`: each lane's.
using Collective = void (*)(void* const (&operands)[32]);

struct Fiber {
  ucontext_t context;
  State state = kRunnable;
  Collective collective = nullptr;
  void* operands = nullptr;
};

constexpr size_t kStack = 64 << 10;
inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline ucontext_t scheduler;
inline size_t current;
inline std::mt19937 order;
inline std::function<void()> thread_body;

inline void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void with_warp(Collective collective, void* operands) {
  fibers[current].collective = collective;
  fibers[current].operands = operands;
  wait(kWithWarp);
}

inline void run_fiber() {
  thread_body();
  fibers[current].state = kDone;
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "block %u: %s\n", blockIdx.x, what);
  abort();
}

// Releases the warps whose 32 lanes all stand at the same instruction of a warp, else the block if all its threads stand
// at a barrier.
inline bool release() {
  size_t runnable = 0, at_barrier = 0, done = 0;
  for (size_t warp = 0; warp < fibers.size(); warp += 32) {
    size_t with_warp = 0, together = 0;
    void* operands[32];
    for (size_t i = warp; i < warp + 32; ++i) {
      operands[i - warp] = fibers[i].operands;
      runnable += fibers[i].state == kRunnable;
      with_warp += fibers[i].state == kWithWarp;
      together += fibers[i].state == kWithWarp && fibers[i].collective == fibers[warp].collective;
      at_barrier += fibers[i].state == kAtBarrier;
      done += fibers[i].state == kDone;
    }
    if (with_warp == 0) continue;
    if (together != 32) fail("a shuffle, or another instruction of a warp, that not all lanes reach");
    fibers[warp].collective(operands);
    for (size_t i = warp; i < warp + 32; ++i) fibers[i].state = kRunnable;
    runnable += 32;
  }
  if (runnable) return true;
  if (done == fibers.size()) return false;
  if (at_barrier != fibers.size()) fail("a barrier that not all threads reach");
  for (Fiber& fiber : fibers) fiber.state = kRunnable;
  return true;
}

inline void run_block(dim3 block) {
  const size_t count = static_cast<size_t>(block.x) * block.y;
  if (count % 32 || block.z != 1) fail("a block that is not made of whole warps");
  fibers.assign(count, Fiber());
  stacks.resize(count * kStack);
  std::vector<size_t> turns(count);
  std::vector<bool> chosen(count / 32);
  for (size_t i = 0; i < count; ++i) {
    turns[i] = i;
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = stacks.data() + i * kStack;
    fibers[i].context.uc_stack.ss_size = kStack;
    fibers[i].context.uc_link = &scheduler;
    makecontext(&fibers[i].context, run_fiber, 0);
  }
  do {
    std::shuffle(turns.begin(), turns.end(), order);
    for (size_t warp = 0; warp < chosen.size(); ++warp) chosen[warp] = order() % 2;
    for (size_t i : turns) {
      if (!chosen[i / 32] || fibers[i].state != kRunnable) continue;
      current = i;
      threadIdx = dim3(i % block.x, i / block.x);
      swapcontext(&scheduler, &fibers[i].context);
    }
  } while (release());
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::wait(on_cpu::kAtBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  struct Lane {
    float given, received;
    int lane_mask;
  } mine{value, 0.0f, lane_mask};
  on_cpu::with_warp(
      [](void* const(&operands)[32]) {
        for (int i = 0; i < 32; ++i) {
          Lane* lane = static_cast<Lane*>(operands[i]);
          lane->received = static_cast<Lane*>(operands[i ^ lane->lane_mask])->given;
        }
      },
      &mine);
  return mine.received;
}

using cudaStream_t = struct CpuStream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid configuration argument" : "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (grid.x == 0 || block.x * block.y > 1024) return cudaErrorInvalidConfiguration;
  const Arguments copy = *static_cast<const Arguments*>(arguments[0]);
  on_cpu::thread_body = [kernel, copy] { kernel(copy); };
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> turns(grid.x);
  std::iota(turns.begin(), turns.end(), 0u);
  std::shuffle(turns.begin(), turns.end(), on_cpu::order);
  for (unsigned i : turns) {
    blockIdx = dim3(i, 0);
    on_cpu::run_block(block);
  }
  return cudaSuccess;
}
