// The arguments of the kernels of `rope`, which `vision_rope` uses too, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

constexpr int64_t kMaxRopeDim = 1024;  // of a head

// The positions of every token, and the angle of each pair of a head's elements: position · inv_freq.
struct RopeAngles {
  const void* positions;              // int32 or int64 [axes, tokens]; null: the rows and columns of `grid`
  int64_t axis_stride, token_stride;  // of `positions`, in elements
  const int64_t* grid;                // [images, 3]: frames, rows, columns of patches; checked
  int64_t images, merge_size;
  const double* inv_freq;  // [half]
  const int32_t* axis;     // [half]: which of a token's positions, 0 to 2
  int64_t axes;
  int wide;    // the positions are int64
  int single;  // the angle is a product of float32, rounded to it; else of float64
};

// Tensors are [tokens, heads, dim] with a dense last dimension; the strides are in elements.
struct RopeFwdTensor {
  void* output;  // dense
  const void* input;
  const void* weight;  // [dim] of the norm, or null
  int64_t heads, token_stride, head_stride;
};

struct RopeFwd {
  RopeAngles angles;
  RopeFwdTensor tensors[2];
  int64_t tokens, dim, half;  // the first 2 · half elements of a head are rotated
  double eps;
  int numerics;  // of the rounding; kFp32 rounds only what is written
  int dtype, threads;
};

struct RopeBwdTensor {
  void* grad_input;   // dense
  void* grad_weight;  // [dim], or null
  const void* grad_output;
  const void* input;   // null if and only if weight is
  const void* weight;  // or null
  int64_t heads, grad_token_stride, grad_head_stride, token_stride, head_stride;
};

struct RopeBwd {
  RopeAngles angles;
  RopeBwdTensor tensors[2];
  float* partials;  // scratch [blocks, 2, groups of a head's dim], or null where no weight wants a gradient
  int64_t tokens, dim, half;
  int64_t blocks;  // of tokens, each summed in order into one partial of grad_weight; not a function of `threads`
  double eps;
  int dtype, threads;
};

// Room for one partial gradient of a weight, whose three runs of elements (the two halves that are rotated against each
// other, and the rest) are each padded to whole groups.
static constexpr int64_t rope_partial(int64_t dim) { return dim + 3 * kPartialAlign; }

}  // namespace m4ov

#define M4OV_ROPE_KERNELS(X) \
  X(void, rope_fwd, RopeFwd) \
  X(void, rope_bwd, RopeBwd)
