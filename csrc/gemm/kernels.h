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

}  // namespace m4ov

#define M4OV_GEMM_KERNELS(X) X(int64_t, invariant_linear, InvariantLinear)
