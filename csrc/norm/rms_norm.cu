// RMSNorm, with the addition of a residual before it: forward and backward on NVIDIA GPUs.
//
// blockDim.x threads share a row and blockDim.y rows share a block. Thread x holds the vectors x, x + blockDim.x, ... of
// its row in registers (kHold of them), so that each input is read once; kHold = 0 reads rows that are too wide twice.
#include "../common/cuda.cuh"
#include "rms_norm.cuh"

namespace m4ov {
namespace {

constexpr int kElements = 16;  // of a row, held per thread; the backward keeps three values of each

// ---- Forward

template <bool kAligned, typename T>
__device__ __forceinline__ void load_sum(const RmsNormFwd& a, int64_t row, int64_t column, float (&x)[kWidth<T>],
                                         bool write) {
  const int64_t left = a.columns - column;
  load<kAligned>(static_cast<const T*>(a.hidden_states) + row * a.hidden_stride + column, left, x);
  if (a.residual == nullptr) return;
  float residual[kWidth<T>];
  load<kAligned>(static_cast<const T*>(a.residual) + row * a.residual_stride + column, left, residual);
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) x[i] += residual[i];
  if (write) store<kAligned>(static_cast<T*>(a.new_residual) + row * a.columns + column, left, x);
  if (a.numerics == kFp32) return;
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) x[i] = round_to<T>(x[i]);
}

template <bool kAligned, typename T>
__device__ __forceinline__ void write_normed(const RmsNormFwd& a, int64_t row, int64_t column, float rstd,
                                             const float (&x)[kWidth<T>]) {
  const int64_t left = a.columns - column;
  float weight[kWidth<T>], y[kWidth<T>];
  load<kAligned>(static_cast<const T*>(a.weight) + column, left, weight);
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    const float normed = x[i] * rstd;
    y[i] = (a.numerics == kHf ? round_to<T>(normed) : normed) * weight[i];
  }
  store<kAligned>(static_cast<T*>(a.normed) + row * a.columns + column, left, y);
}

template <typename T>
__device__ __forceinline__ float add_squares(float sum, const float (&x)[kWidth<T>]) {
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) sum = fmaf(x[i], x[i], sum);
  return sum;
}

template <typename T, bool kAligned, int kHold>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_fwd_kernel(const RmsNormFwd a) {
  constexpr int kW = kWidth<T>;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kW;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kW;
  const int64_t rows_per_pass = static_cast<int64_t>(gridDim.x) * blockDim.y;
  // The bound depends on the block and not on the thread: every thread reaches row_sum.
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.y; base < a.rows; base += rows_per_pass) {
    const int64_t row = base + threadIdx.y;
    const bool live = row < a.rows;
    float held[kHold ? kHold : 1][kW];
    float squares = 0.0f;
    if constexpr (kHold > 0) {
#pragma unroll
      for (int k = 0; k < kHold; ++k) {
        const int64_t column = first + k * step;
        if (live && column < a.columns) {
          load_sum<kAligned, T>(a, row, column, held[k], true);
          squares = add_squares<T>(squares, held[k]);
        }
      }
    } else if (live) {
      for (int64_t column = first; column < a.columns; column += step) {
        load_sum<kAligned, T>(a, row, column, held[0], true);
        squares = add_squares<T>(squares, held[0]);
      }
    }
    const float rstd = rsqrtf(row_sum(squares) / static_cast<float>(a.columns) + a.eps);
    if (!live) continue;
    if (threadIdx.x == 0) a.rstd[row] = rstd;
    if constexpr (kHold > 0) {
#pragma unroll
      for (int k = 0; k < kHold; ++k) {
        const int64_t column = first + k * step;
        if (column < a.columns) write_normed<kAligned, T>(a, row, column, rstd, held[k]);
      }
    } else {
      for (int64_t column = first; column < a.columns; column += step) {
        load_sum<kAligned, T>(a, row, column, held[0], false);
        write_normed<kAligned, T>(a, row, column, rstd, held[0]);
      }
    }
  }
}

// ---- Backward. A walker (the threads of one threadIdx.y) takes the rows w, w + a.blocks, ... and sums the gradient of
// the weight over them into partial w; rms_norm_bwd_reduce_kernel adds the partials in order.

// normed = x · rstd and weighted = grad · weight; returns their products added to `sum`.
template <bool kAligned, typename T>
__device__ __forceinline__ float load_terms(const RmsNormBwd& a, int64_t row, int64_t column, float rstd, float sum,
                                            float (&normed)[kWidth<T>], float (&grad)[kWidth<T>],
                                            float (&weighted)[kWidth<T>]) {
  const int64_t left = a.columns - column;
  load<kAligned>(static_cast<const T*>(a.hidden_states) + row * a.hidden_stride + column, left, normed);
  load<kAligned>(static_cast<const T*>(a.grad_normed) + row * a.grad_stride + column, left, grad);
  load<kAligned>(static_cast<const T*>(a.weight) + column, left, weighted);
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    normed[i] = kAligned || i < left ? normed[i] * rstd : 0.0f;  // 0 · rstd is NaN if rstd is infinite
    weighted[i] *= grad[i];
    sum = fmaf(weighted[i], normed[i], sum);
  }
  return sum;
}

template <bool kAligned, typename T>
__device__ __forceinline__ void write_grad(const RmsNormBwd& a, int64_t row, int64_t column, float rstd, float mean,
                                           const float (&normed)[kWidth<T>], const float (&weighted)[kWidth<T>]) {
  const int64_t left = a.columns - column;
  float result[kWidth<T>];
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) result[i] = (weighted[i] - normed[i] * mean) * rstd;
  if (a.grad_residual != nullptr) {
    float added[kWidth<T>];
    load<kAligned>(static_cast<const T*>(a.grad_residual) + row * a.grad_residual_stride + column, left, added);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) result[i] += added[i];
  }
  store<kAligned>(static_cast<T*>(a.grad_hidden_states) + row * a.columns + column, left, result);
}

// `values` added to (or, when `assign`, written to) kW floats of a partial; rows of partials are padded for it.
template <int kW>
__device__ __forceinline__ void put_partial(float* p, const float (&values)[kW], bool assign) {
  static_assert(kW % 4 == 0 && kPartialAlign % kW == 0, "whole vectors fit into the padding");
#pragma unroll
  for (int i = 0; i < kW; i += 4) {
    float4* place = reinterpret_cast<float4*>(p + i);
    float4 sum = assign ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *place;
    sum.x += values[i];
    sum.y += values[i + 1];
    sum.z += values[i + 2];
    sum.w += values[i + 3];
    *place = sum;
  }
}

template <typename T, bool kAligned, int kHold>
__global__ void __launch_bounds__(kMaxThreads, 1) rms_norm_bwd_kernel(const RmsNormBwd a) {
  constexpr int kW = kWidth<T>;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kW;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kW;
  const int64_t padded = (a.columns + kPartialAlign - 1) / kPartialAlign * kPartialAlign;
  const int64_t first_walker = static_cast<int64_t>(blockIdx.x) * blockDim.y;
  const int64_t walker = first_walker + threadIdx.y;
  const bool need_weight = a.grad_weight != nullptr;
  float* partial = need_weight ? a.partials + walker * padded : nullptr;
  const float columns = static_cast<float>(a.columns);
  float grad_weight[kHold ? kHold : 1][kW] = {};
  for (int64_t base = 0; first_walker + base < a.rows; base += a.blocks) {
    const int64_t row = walker + base;
    const bool live = walker < a.blocks && row < a.rows;
    const float rstd = live ? a.rstd[row] : 0.0f;
    float normed[kHold ? kHold : 1][kW], weighted[kHold ? kHold : 1][kW], grad[kW];
    float sum = 0.0f;
    if constexpr (kHold > 0) {
#pragma unroll
      for (int k = 0; k < kHold; ++k) {
        const int64_t column = first + k * step;
        if (live && column < a.columns) {
          sum = load_terms<kAligned, T>(a, row, column, rstd, sum, normed[k], grad, weighted[k]);
#pragma unroll
          for (int i = 0; i < kW; ++i) grad_weight[k][i] = fmaf(grad[i], normed[k][i], grad_weight[k][i]);
        }
      }
    } else if (live) {
      for (int64_t column = first; column < a.columns; column += step) {
        sum = load_terms<kAligned, T>(a, row, column, rstd, sum, normed[0], grad, weighted[0]);
#pragma unroll
        for (int i = 0; i < kW; ++i) grad[i] *= normed[0][i];
        if (need_weight) put_partial(partial + column, grad, base == 0);
      }
    }
    const float mean = row_sum(sum) / columns;
    if (!live) continue;
    if constexpr (kHold > 0) {
#pragma unroll
      for (int k = 0; k < kHold; ++k) {
        const int64_t column = first + k * step;
        if (column < a.columns) write_grad<kAligned, T>(a, row, column, rstd, mean, normed[k], weighted[k]);
      }
    } else {
      for (int64_t column = first; column < a.columns; column += step) {
        load_terms<kAligned, T>(a, row, column, rstd, 0.0f, normed[0], grad, weighted[0]);
        write_grad<kAligned, T>(a, row, column, rstd, mean, normed[0], weighted[0]);
      }
    }
  }
  if constexpr (kHold > 0) {
    if (!need_weight || walker >= a.blocks) return;
#pragma unroll
    for (int k = 0; k < kHold; ++k) {
      const int64_t column = first + k * step;
      if (column < a.columns) put_partial(partial + column, grad_weight[k], true);
    }
  }
}

constexpr int kReduceRows = 16;  // partials summed side by side in a block of a warp's width of columns

template <typename T>
__global__ void __launch_bounds__(kWarp* kReduceRows) rms_norm_bwd_reduce_kernel(const RmsNormBwd a) {
  __shared__ float sums[kReduceRows][kWarp];
  const int64_t padded = (a.columns + kPartialAlign - 1) / kPartialAlign * kPartialAlign;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kWarp; base < a.columns;
       base += static_cast<int64_t>(gridDim.x) * kWarp) {
    const int64_t column = base + threadIdx.x;
    float sum = 0.0f;
    if (a.rows > 0 && column < a.columns) {
#pragma unroll 4
      for (int64_t block = threadIdx.y; block < a.blocks; block += kReduceRows) sum += a.partials[block * padded + column];
    }
    __syncthreads();  // the sums of the columns before may still be read
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < a.columns) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kReduceRows; ++i) total += sums[i][threadIdx.x];
      static_cast<T*>(a.grad_weight)[column] = from_float<T>(total);
    }
  }
}

// ---- Launches

template <typename T>
bool aligned_rows(int64_t columns, int64_t stride_a, int64_t stride_b, int64_t stride_c) {
  return columns % kWidth<T> == 0 && stride_a % kWidth<T> == 0 && stride_b % kWidth<T> == 0 && stride_c % kWidth<T> == 0;
}

template <typename T>
const char* forward(const RmsNormFwd& a, void* stream) {
  constexpr int kHold = kElements / kWidth<T>;
  const dim3 block = block_of_rows(threads_of_row(a.columns, kElements));
  const bool held = a.columns <= static_cast<int64_t>(block.x) * kElements;
  const bool fast = aligned_rows<T>(a.columns, a.hidden_stride, a.residual ? a.residual_stride : 0, 0) &&
                    aligned(a.normed) && aligned(a.new_residual) && aligned(a.hidden_states) && aligned(a.weight) &&
                    aligned(a.residual);
  const auto kernel = held ? (fast ? rms_norm_fwd_kernel<T, true, kHold> : rms_norm_fwd_kernel<T, false, kHold>)
                           : (fast ? rms_norm_fwd_kernel<T, true, 0> : rms_norm_fwd_kernel<T, false, 0>);
  return launch(kernel, divide_up(a.rows, block.y), block, a, stream);
}

template <typename T>
const char* backward(const RmsNormBwd& arguments, void* stream) {
  constexpr int kHold = kElements / kWidth<T>;
  RmsNormBwd a = arguments;
  if (a.grad_weight == nullptr) a.blocks = a.rows < kMaxGrid ? a.rows : kMaxGrid;  // nothing to sum over rows
  const dim3 block = block_of_rows(threads_of_row(a.columns, kElements));
  const bool held = a.columns <= static_cast<int64_t>(block.x) * kElements;
  const bool fast = aligned_rows<T>(a.columns, a.hidden_stride, a.grad_stride,
                                    a.grad_residual ? a.grad_residual_stride : 0) &&
                    aligned(a.grad_hidden_states) && aligned(a.grad_normed) && aligned(a.grad_residual) &&
                    aligned(a.hidden_states) && aligned(a.weight);
  const auto kernel = held ? (fast ? rms_norm_bwd_kernel<T, true, kHold> : rms_norm_bwd_kernel<T, false, kHold>)
                           : (fast ? rms_norm_bwd_kernel<T, true, 0> : rms_norm_bwd_kernel<T, false, 0>);
  if (a.rows > 0) {
    if (const char* error = launch(kernel, divide_up(a.blocks, block.y), block, a, stream)) return error;
  }
  if (a.grad_weight == nullptr) return nullptr;
  return launch(rms_norm_bwd_reduce_kernel<T>, divide_up(a.columns, kWarp), dim3(kWarp, kReduceRows), a, stream);
}

}  // namespace

int64_t rms_norm_bwd_cuda_blocks(int64_t rows, int64_t columns) {
  // At most 4 MiB of partials, but enough walkers to fill a large GPU.
  int64_t most = (int64_t{1} << 20) / columns;
  most = most < 256 ? 256 : most > 2048 ? 2048 : most;
  const int64_t blocks = rows < most ? rows : most;
  return blocks < 1 ? 1 : blocks;
}

const char* rms_norm_fwd_cuda(const RmsNormFwd& a, void* stream) {
  if (a.rows == 0) return nullptr;
  switch (a.dtype) {
    case kFloat32: return forward<float>(a, stream);
    case kBFloat16: return forward<__nv_bfloat16>(a, stream);
    case kFloat16: return forward<__half>(a, stream);
  }
  return "rms_norm: unknown dtype";
}

const char* rms_norm_bwd_cuda(const RmsNormBwd& a, void* stream) {
  if (a.grad_weight != nullptr) {
    if (a.blocks < 1 || a.blocks > (a.rows > 1 ? a.rows : 1)) return "rms_norm: blocks must be from 1 to the rows";
    if (!aligned(a.partials)) return "rms_norm: partials are not 16-byte aligned";
  }
  switch (a.dtype) {
    case kFloat32: return backward<float>(a, stream);
    case kBFloat16: return backward<__nv_bfloat16>(a, stream);
    case kFloat16: return backward<__half>(a, stream);
  }
  return "rms_norm: unknown dtype";
}

}  // namespace m4ov
