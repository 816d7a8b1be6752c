// The arguments of the kernels of `activation`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

struct GatedFwd {
  void* output;
  const void* gate;
  const void* up;
  int64_t rows, columns, gate_stride, up_stride;
  int numerics, dtype, threads;
};

struct GatedBwd {
  void* grad_gate;
  void* grad_up;
  const void* grad_output;
  const void* gate;
  const void* up;
  int64_t rows, columns, grad_stride, gate_stride, up_stride;
  int dtype, threads;
};

struct GegluFwd : GatedFwd {
  int tanh;  // the approximation instead of the error function
};

struct GegluBwd : GatedBwd {
  int tanh;
};

struct GeluFwd {
  void* output;
  const void* input;
  const void* bias;  // [columns], added to every row first, or null
  int64_t rows, columns, input_stride;
  int tanh, dtype, threads;
};

struct GeluBwd {
  void* grad_input;
  void* grad_bias;  // [columns], or null
  float* partials;  // scratch [blocks, columns rounded up to kPartialAlign], or null with grad_bias
  const void* grad_output;
  const void* input;
  const void* bias;  // or null
  int64_t rows, columns, grad_stride, input_stride;
  int64_t blocks;  // row blocks, each summed in order into one partial of grad_bias; not a function of `threads`
  int tanh, dtype, threads;
};

}  // namespace m4ov

#define M4OV_ACTIVATION_KERNELS(X) \
  X(void, geglu_fwd, GegluFwd) \
  X(void, geglu_bwd, GegluBwd) \
  X(void, gelu_fwd, GeluFwd) \
  X(void, gelu_bwd, GeluBwd) \
  X(void, swiglu_fwd, GatedFwd) \
  X(void, swiglu_bwd, GatedBwd)
