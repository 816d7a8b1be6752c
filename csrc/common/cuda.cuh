// What the CUDA kernels share: element types, 16-byte vectors of them, sums over the threads of a row, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

namespace m4ov {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;  // of a block: 128 registers each

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

// As many elements as fill 16 bytes.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

template <typename T>
struct alignas(16) Packed {
  T values[kWidth<T>];
};
static_assert(sizeof(Packed<float>) == 16 && sizeof(Packed<__half>) == 16 && sizeof(Packed<__nv_bfloat16>) == 16,
              "one vector is one 16-byte access");

// Reads the kWidth elements from `p` on, of which `left` (at least 1) exist; the others become 0. With kAligned, `p` is
// 16-byte aligned and all exist. Elements meet the same threads in the same order either way: alignment changes no bit.
// No thread of the kernel may write them: such loads need not wait for the stores before them.
template <bool kAligned, typename T>
__device__ __forceinline__ void load(const T* p, int64_t left, float (&out)[kWidth<T>]) {
  if constexpr (kAligned) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    Packed<T> packed;
    memcpy(&packed, &raw, sizeof(packed));
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) out[i] = to_float(packed.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) out[i] = i < left ? to_float(__ldg(p + i)) : 0.0f;
  }
}

// Writes the first `left` (at least 1) of kWidth elements, rounded to nearest even.
template <bool kAligned, typename T>
__device__ __forceinline__ void store(T* p, int64_t left, const float (&in)[kWidth<T>]) {
  if constexpr (kAligned) {
    Packed<T> packed;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) packed.values[i] = from_float<T>(in[i]);
    *reinterpret_cast<Packed<T>*>(p) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      if (i < left) p[i] = from_float<T>(in[i]);
    }
  }
}

// Sum over threadIdx.x, for each threadIdx.y; blockDim.x is a power of two from 32 on. Every thread of the block calls
// it. All threads of a row get the same bits, which depend on blockDim.x and not on blockDim.y.
__device__ __forceinline__ float row_sum(float value) {
  __shared__ float of_warp[kMaxThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const unsigned warps = blockDim.x / kWarp;
  if (warps == 1) return value;  // the same for every thread of the block
  float* of_row = of_warp + threadIdx.y * warps;
  __syncthreads();  // the sums of the call before may still be read
  if (threadIdx.x % kWarp == 0) of_row[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned warp = 0; warp < warps; ++warp) total += of_row[warp];
  return total;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block that share a row of `columns` elements, `per_thread` each: a power of two, at most kMaxThreads.
inline int threads_of_row(int64_t columns, int per_thread) {
  int threads = kWarp;
  while (threads < kMaxThreads && static_cast<int64_t>(threads) * per_thread < columns) threads *= 2;
  return threads;
}

// A block of whole rows: `row_threads` by as many rows as make 128 threads.
inline dim3 block_of_rows(int row_threads) { return dim3(row_threads, row_threads < 128 ? 128 / row_threads : 1); }

constexpr int64_t kMaxGrid = int64_t{1} << 30;

// Launches, and returns null or the error in words. A kernel loops over what a grid of kMaxGrid leaves over.
template <typename Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks, dim3 block, Arguments arguments, void* stream) {
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid));
  void* pointers[] = {&arguments};
  const cudaError_t error = cudaLaunchKernel(kernel, grid, block, pointers, 0, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: not to be found by whoever looks next
  return cudaGetErrorString(error);
}

}  // namespace m4ov
