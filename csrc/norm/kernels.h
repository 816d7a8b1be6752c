// The arguments of the kernels of `norm`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

struct RmsNormFwd {
  void* normed;
  void* new_residual;  // null if and only if residual is
  float* rstd;         // [rows]
  const void* hidden_states;
  const void* weight;  // [columns]
  const void* residual;
  int64_t rows, columns, hidden_stride, residual_stride;
  float eps;
  int numerics, dtype, threads;
};

struct RmsNormBwd {
  void* grad_hidden_states;
  void* grad_weight;  // [columns], or null
  float* partials;    // scratch [blocks, columns rounded up to kPartialAlign], or null with grad_weight
  const void* grad_normed;
  const void* grad_residual;  // or null
  const void* hidden_states;
  const void* weight;
  const float* rstd;
  int64_t rows, columns, grad_stride, grad_residual_stride, hidden_stride;
  int64_t blocks;  // row blocks, each summed in order into one partial of grad_weight; not a function of `threads`
  int dtype, threads;
};

struct LayerNormFwd {
  void* normed;
  void* new_residual;  // null if and only if residual is
  float* mean;         // [rows]
  float* rstd;         // [rows]
  const void* hidden_states;
  const void* weight;    // [columns]
  const void* bias;      // [columns]
  const void* residual;  // or null
  int64_t rows, columns, hidden_stride, residual_stride;
  float eps;
  int numerics, dtype, threads;
};

struct LayerNormBwd {
  void* grad_hidden_states;
  void* grad_weight;  // [columns], or null
  void* grad_bias;    // [columns], or null
  float* partials;    // scratch [blocks, 2, columns rounded up to kPartialAlign], or null with both of these
  const void* grad_normed;
  const void* grad_residual;  // or null
  const void* hidden_states;
  const void* weight;
  const float* mean;
  const float* rstd;
  int64_t rows, columns, grad_stride, grad_residual_stride, hidden_stride;
  int64_t blocks;  // as in RmsNormBwd
  int dtype, threads;
};

}  // namespace m4ov

#define M4OV_NORM_KERNELS(X) \
  X(void, layer_norm_fwd, LayerNormFwd) \
  X(void, layer_norm_bwd, LayerNormBwd) \
  X(void, rms_norm_fwd, RmsNormFwd) \
  X(void, rms_norm_bwd, RmsNormBwd)
