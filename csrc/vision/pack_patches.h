// The arguments of pack_patches, for the CPU and for CUDA.
#pragma once

#include "../common/types.h"

namespace m4ov {

// One image, or one frame of a video; pixels_native.py writes it, eight bytes a field. Of a greyscale image (one
// channel) all three channels of the patches are made.
struct PackImage {
  const uint8_t* source;
  int64_t height, width, channels;  // channels: 1 or 3
  int64_t row, pixel, channel;      // strides in bytes; pixel is 1, or it is 3 or 4 and channel is 1
  int64_t resized_height, resized_width;  // multiples of patch_size * merge_size
  // Weights of each resized row and column: `window` int32 each, as a Window (bytes.h) reads them; null: the size stays.
  const int32_t *vertical, *horizontal;
  int64_t vertical_window, horizontal_window;
  int64_t vertical_first;  // which pass rounds to eight bits first
  int64_t first_patch;     // of the image, in the output
  int64_t slot, copies;    // the temporal places in the patch that it fills
  int64_t first_strip;     // CPU: number of strips of the images before it
  uint8_t* between;        // CUDA: scratch for what the first pass makes; CPU: null
};

struct PackPatches {
  void* output;             // [patches, 3, temporal_patch_size, patch_size, patch_size]
  const PackImage* images;  // [count], at least one
  int64_t count, patches;
  int64_t strips, strip_rows;  // CPU: strips of all images, rows of patches in a strip
  int64_t between_bytes;       // CUDA: of `between`, all images together
  int64_t patch_size, temporal_patch_size, merge_size;
  float mean[3], std[3];
  int dtype, threads;
  char* scratch;  // CPU: 64-byte aligned, for each thread what a call with null returns
};

}  // namespace m4ov
