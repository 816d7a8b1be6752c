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

// input [rows, columns] to int8 (symmetric, ±127) or e4m3 (±448): codes = input / scale, rounded, scale = the largest
// magnitude over 127 or 448, at least 2^-126. What shares a scale and is not finite throughout has the scale NaN and
// zeros for codes.
struct QuantizeRows {
  void* codes;    // int8 or e4m3 [rows, columns]
  float* scales;  // [rows, columns / group, rounded up]
  const void* input;
  int64_t rows, columns, input_stride;
  int64_t group;  // elements of a row that share a scale; 0: all of them
  int fp8, dtype, threads;
};

struct QuantizeBlocks {
  void* codes;       // e4m3 [rows, columns]
  void* transposed;  // the same codes, [columns, rows], or null
  float* scales;     // [rows / 128, columns / 128], rounded up
  const void* input;
  int64_t rows, columns, input_stride;
  int dtype, threads;
};

// As RmsNormFwd, then QuantizeRows of what that makes.
struct RmsNormQuantize {
  void* codes;
  float* scales;       // [rows]
  void* new_residual;  // null if and only if residual is
  char* scratch;       // `threads` rows of the input's type, each rounded up to 64 bytes; 64-byte aligned
  const void* hidden_states;
  const void* weight;
  const void* residual;
  int64_t rows, columns, hidden_stride, residual_stride;
  float eps;
  int fp8, numerics, dtype, threads;
};

// As GatedFwd of SiLU, then QuantizeRows of what that makes.
struct SwigluQuantize {
  void* codes;
  float* scales;  // [rows]
  char* scratch;  // as in RmsNormQuantize
  const void* gate;
  const void* up;
  int64_t rows, columns, gate_stride, up_stride;
  int fp8, numerics, dtype, threads;
};

// A weight [rows, columns] to the panels that m4ov_kernels/gemm/panels.py describes, rounded as Int8Weight, Fp8Weight and
// Int4Weight (symmetric) do. Returns the bits of its largest magnitude, by which the caller refuses what those refuse:
// then nothing that was written means anything.
struct Requantize {
  uint8_t* codes;   // of every panel
  void* scales;     // [panels, groups, 64]
  float* scratch;   // [rows / 128, groups], rounded up
  const void* weight;
  int64_t rows, columns, weight_stride;
  int64_t group;    // elements of a row that share a scale; 0: all of them
  int kind;         // 0: int4; 1: int8; 2: e4m3
  int span;         // rows that share a scale: 0: one; 1: 128; 2: all
  int paired;       // panels in turn of the rows of the first half and of the second
  int scale_dtype, dtype, threads;
};

// Rows of codes to the panels that m4ov_kernels/gemm/panels.py describes, in words of some bytes of each row.
struct PackPanels {
  uint8_t* panels;  // [panels, words, 64, word_bytes]
  const uint8_t* codes;
  int64_t rows, columns, row_stride;  // columns: bytes of a row
  int word_bytes;   // 2 or 4
  int flip;         // the bits that differ in every byte; what is past the end of the codes is 0 before
  int paired;       // as in Requantize
  int threads;
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

#define M4OV_GEMM_KERNELS(X) \
  X(int64_t, invariant_linear, InvariantLinear) \
  X(void, quantize_rows, QuantizeRows) \
  X(void, quantize_blocks, QuantizeBlocks) \
  X(void, rms_norm_quantize, RmsNormQuantize) \
  X(void, swiglu_quantize, SwigluQuantize) \
  X(int64_t, requantize, Requantize) \
  X(void, pack_panels, PackPanels) \
  X(int64_t, quantized_linear, QuantizedLinear)
