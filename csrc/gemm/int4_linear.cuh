// Launcher of the CUDA kernel of int4_linear; plain C++, for bind.h.
#pragma once

#include <stdint.h>

namespace m4ov {

// output[m, n] = sum over k of input[m, k] · (q[n, k] − z[n, g(k)]) · s[n, g(k)], + bias[n] + residual[m, n]: products
// and sums in fp32, rounded once. All pointers are device memory.
struct Int4Linear {
  void* output;           // [rows, columns], dense, of `dtype`
  const void* input;      // bf16 [rows, width], input_row apart; 16-byte aligned, and so is every row
  const void* codes;      // uint8 [columns, 4 ⌈width / 8⌉], dense, even k in the low nibble, 4-byte aligned
  const void* scales;     // [columns, groups], dense, of `scale_dtype`
  const uint8_t* zeros;   // [columns, groups] of 0..15; null: 8
  const void* bias;       // [columns], of `dtype`; or null
  const void* residual;   // [rows, columns], residual_row apart, of `dtype`; or null
  float* partials;        // scratch of plan.partials floats, 16-byte aligned
  int* arrivals;          // scratch of plan.tiles integers, all 0
  int64_t rows, columns, width, input_row, residual_row;
  int64_t group, groups;  // 32, 64 or 128 features of the input; with one group it is not looked at
  int64_t blocks;         // plan.blocks
  int scale_dtype, dtype;
};

// How many blocks share the work (a function of columns, width and GPU), and the scratch that they need.
struct Int4LinearPlan {
  int64_t blocks, partials, tiles;
};

Int4LinearPlan int4_linear_cuda_plan(int64_t rows, int64_t columns, int64_t width, int64_t multiprocessors);

// Enqueues on `stream` (a cudaStream_t of the current device) and returns null, or what went wrong in words. No host
// synchronisation. The bits of a row follow from that row, the weight and the number of blocks.
const char* int4_linear_cuda(const Int4Linear& arguments, void* stream);

}  // namespace m4ov
