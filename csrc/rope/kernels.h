// The arguments of the kernels of `rope`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

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
#define M4OV_ROPE_KERNELS(X) X(int, mrope_positions, MropePositions)
