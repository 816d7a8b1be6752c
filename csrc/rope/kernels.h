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

// Positions of multimodal rotary embedding: see m4ov_kernels/rope/positions.py. All tensors are dense.
struct MropePositions {
  int64_t* position_ids;  // [3, tokens]
  int64_t* deltas;        // [samples]
  const void* kinds;      // [tokens], int64 or, if `narrow`, int32: which of them are image_kind and video_kind
  const int64_t* cu_seqlens;   // [samples + 1]
  const int64_t* image_grid;   // [images, 3]
  const int64_t* video_grid;   // [videos, 3]
  const float* intervals;      // [videos], of positions between frames; null: each frame is by itself
  int64_t* scratch;            // mrope_positions_scratch() elements
  int64_t tokens, samples, images, videos, image_kind, video_kind, merge_size;
  int typed;  // kinds must be 0, 1 or 2
  int narrow, threads;
};

constexpr int64_t kMropeChunk = 16384;  // tokens that one thread works on at a time

// Elements of scratch: two tables of items with starts and steps, three numbers a bound, three a chunk.
inline int64_t mrope_positions_scratch(int64_t tokens, int64_t samples, int64_t images, int64_t videos) {
  return 2 * (images + videos + 2) + 3 * (samples + 1) + 3 * (tokens / kMropeChunk + 2);
}

}  // namespace m4ov

// mrope_positions: 0, or 1 if values of the arguments are wrong; then the results are not complete.
#define M4OV_ROPE_KERNELS(X)                  \
  X(int, mrope_positions, MropePositions)     \
  X(void, rope_fwd, RopeFwd)                  \
  X(void, rope_bwd, RopeBwd)
