// One set of functions per instruction set: all that the families' lists (csrc/<family>/kernels.h) name.
#pragma once

#include "../activation/kernels.h"
#include "../attention/kernels.h"
#include "../decoding/kernels.h"
#include "../gemm/kernels.h"
#include "../head/kernels.h"
#include "../moe/kernels.h"
#include "../norm/kernels.h"
#include "../packing/kernels.h"
#include "../rope/kernels.h"
#include "../vision/kernels.h"
#include "limits.h"

#define M4OV_KERNELS(X)    \
  M4OV_ACTIVATION_KERNELS(X) \
  M4OV_ATTENTION_KERNELS(X)  \
  M4OV_DECODING_KERNELS(X)   \
  M4OV_GEMM_KERNELS(X)       \
  M4OV_HEAD_KERNELS(X)       \
  M4OV_LIMIT_KERNELS(X)      \
  M4OV_MOE_KERNELS(X)        \
  M4OV_NORM_KERNELS(X)       \
  M4OV_PACKING_KERNELS(X)    \
  M4OV_ROPE_KERNELS(X)       \
  M4OV_VISION_KERNELS(X)

namespace m4ov {

struct Kernels {
#define M4OV_MEMBER(result, function, arguments) result (*function)(const arguments&);
  M4OV_KERNELS(M4OV_MEMBER)
#undef M4OV_MEMBER
};

#define M4OV_DECLARE(result, function, arguments) result function(const arguments&);
namespace baseline {
M4OV_KERNELS(M4OV_DECLARE)
}
namespace avx2 {
M4OV_KERNELS(M4OV_DECLARE)
}
namespace avx512 {
M4OV_KERNELS(M4OV_DECLARE)
}
namespace avx512_bf16 {
M4OV_KERNELS(M4OV_DECLARE)
}
#undef M4OV_DECLARE

}  // namespace m4ov
