// The arguments of the kernels of `vision`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"
#include "pack_patches.h"

namespace m4ov {

// Rows of features that go to, or are added to, the rows `positions` of base. Results: -1, or the first n whose position
// is out of range or was there before; then nothing was written.
struct FeatureRows {
  void* output;     // [rows, columns]
  int64_t* source;  // scratch [rows]: which feature a row takes, or -1
  const void* base;
  const void* features;
  const int64_t* positions;  // [count]
  int64_t rows, count, columns, base_stride, features_stride;
  int dtype, threads;
};

struct FeatureRowsBwd {
  void* grad_base;      // or null; zero in the rows `positions`
  void* grad_features;  // or null
  int64_t* source;      // scratch [rows]
  const void* grad_output;
  const int64_t* positions;
  int64_t rows, count, columns, grad_stride;
  int dtype, threads;
};

// Bilinear interpolation of a square table for every patch of every image, the images' corners on the table's. The
// result: -1, the first image whose grid is not positive or not a multiple of merge_size, or -2 where the grids' patches
// are not `patches` in all; then nothing was written.
struct InterpolateFwd {
  void* output;               // [patches, columns]
  const void* table;          // [side · side, columns]
  const void* hidden_states;  // [patches, columns], added to; or null
  const int64_t* grid_thw;    // [images, 3]
  int64_t images, patches, columns, side, hidden_stride, merge_size;
  int numerics, dtype, threads;
};

constexpr int64_t kSumsColumns = 1536;

struct InterpolateBwd {
  void* grad_table;  // [side · side, columns]
  float* sums;       // scratch [threads, side + 1, sums_columns]; those are kSumsColumns, or `columns` and 31 if less
  const void* grad_output;
  const int64_t* grid_thw;
  int64_t images, patches, columns, side, grad_stride, merge_size, sums_columns;
  int dtype, threads;
};

}  // namespace m4ov

#define M4OV_VISION_KERNELS(X)                     \
  X(int64_t, pack_patches, PackPatches)            \
  X(int64_t, scatter_vision_fwd, FeatureRows)      \
  X(int64_t, scatter_vision_bwd, FeatureRowsBwd)   \
  X(int64_t, deepstack_add_fwd, FeatureRows)       \
  X(int64_t, interpolate_fwd, InterpolateFwd)      \
  X(int64_t, interpolate_bwd, InterpolateBwd)
