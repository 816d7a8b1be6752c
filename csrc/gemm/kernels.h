// The arguments of the kernels of `gemm`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

// output[t, n] = sum over k of input[t, k] · weight[n, k], plus bias[n]: summed in fp32, over k in one order, rounded
// once. The bits of a row depend on that row and the weight alone.
struct InvariantLinear {
  const void *input, *weight, *bias;  // [tokens, width]; [columns, width] or, transposed, [width, columns]; or null
  void* output;                       // [tokens, columns], dense
  int64_t tokens, columns, width, input_row, weight_row;  // strides of rows
  int transposed;
  int dtype, threads;
  char* scratch;  // 64-byte aligned; null: the kernel only returns how many bytes it needs
};

enum QuantizedKind : int { kInt4, kInt8, kFp8 };
enum QuantizedActivation : int { kAsBf16, kAsInt8, kAsFp8 };
enum QuantizedEpilogue : int { kNothing, kGelu, kGeluByTanh, kSwiglu };

// output = epilogue(x · Wᵀ + bias) + residual, x the input rounded to bf16, or to int8 or e4m3 with scales, W a quantised weight in
// panels (m4ov_kernels/gemm/panels.py has their layout): 64 features each; with kSwiglu, panels of gates and of ups take
// turns. Everything after the products is in fp32 until the store.
struct QuantizedLinear {
  const void* input;         // [tokens, width], rows input_row apart
  const uint8_t* codes;      // [panels, ...]
  const void* scales;        // [panels, groups, 64], of scale_dtype
  const uint8_t* zeros;      // int4: [panels, groups, 64], or null: 8
  const int32_t* order;      // [places]: the feature at each place, -1: none; or null
  const float* input_scale;  // int4: [width], the input is multiplied by it; fp8: [1], the input's one scale; or null
  const void *bias, *residual;  // [columns]; [tokens, outputs], rows residual_row apart; of dtype, or null
  void* output;              // [tokens, outputs], dense; outputs: columns, or half of them
  int64_t tokens, columns, width, places, group, groups, input_row, residual_row;
  int kind, activation, epilogue, scale_dtype, dtype, threads;
  char* scratch;  // 64-byte aligned; null: the kernel only returns how many bytes it needs
};

}  // namespace m4ov

#define M4OV_GEMM_KERNELS(X)                        \
  X(int64_t, invariant_linear, InvariantLinear)     \
  X(int64_t, quantized_linear, QuantizedLinear)
