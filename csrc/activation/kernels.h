// The arguments of the kernels of `activation`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

struct SwigluFwd {
  void* output;
  const void* gate;
  const void* up;
  int64_t rows, columns, gate_stride, up_stride;
  int numerics, dtype, threads;
};

struct SwigluBwd {
  void* grad_gate;
  void* grad_up;
  const void* grad_output;
  const void* gate;
  const void* up;
  int64_t rows, columns, grad_stride, gate_stride, up_stride;
  int dtype, threads;
};

}  // namespace m4ov

#define M4OV_ACTIVATION_KERNELS(X) \
  X(void, swiglu_fwd, SwigluFwd) \
  X(void, swiglu_bwd, SwigluBwd)
