// The patches of a batch of images in merge order: blocks of merge · merge neighbours one after the other, frame by frame.
#pragma once

#include <stdint.h>

#include "../common/simd.h"

namespace m4ov {
namespace M4OV_VARIANT {

constexpr int64_t kGridsFit = -1, kGridsMiscount = -2;

// kGridsFit; or the first image whose grid is not positive or that merge does not divide; or kGridsMiscount, where the
// grids do not have `patches` patches in all. No product overflows on the way.
static int64_t misfit(const int64_t* grid_thw, int64_t images, int64_t patches, int64_t merge) {
  int64_t total = 0;
  bool beyond = false;
  for (int64_t k = 0; k < images; ++k) {
    const int64_t t = grid_thw[3 * k], h = grid_thw[3 * k + 1], w = grid_thw[3 * k + 2];
    if (t < 1 || h < 1 || w < 1 || h % merge || w % merge) return k;
    beyond = beyond || h > patches / w || t > patches / (h * w) || total > patches - t * h * w;
    if (!beyond) total += t * h * w;
  }
  return beyond || total != patches ? kGridsMiscount : kGridsFit;
}

// Where a patch lies: its image, its frame, its row and column there. Moves from one patch to the next.
struct Patch {
  const int64_t* grid;  // of its image
  int64_t left;         // images after this one
  int64_t merge, t, h, w;
  int64_t frame, block_row, block_column, row_in_block, column_in_block;

  int64_t row() const { return block_row + row_in_block; }
  int64_t column() const { return block_column + column_in_block; }

  void read() {
    t = grid[0];
    h = grid[1];
    w = grid[2];
  }
  void next() {
    if (++column_in_block < merge) return;
    column_in_block = 0;
    if (++row_in_block < merge) return;
    row_in_block = 0;
    if ((block_column += merge) < w) return;
    block_column = 0;
    if ((block_row += merge) < h) return;
    block_row = 0;
    if (++frame < t) return;
    frame = 0;
    if (left == 0) return;
    --left;
    grid += 3;
    read();
  }
};

// The patch `index` of checked grids.
static Patch patch_at(const int64_t* grid_thw, int64_t images, int64_t merge, int64_t index) {
  Patch p{grid_thw, images - 1, merge, 0, 0, 0, 0, 0, 0, 0, 0};
  p.read();
  while (index >= p.t * p.h * p.w) {
    index -= p.t * p.h * p.w;
    --p.left;
    p.grid += 3;
    p.read();
  }
  const int64_t inside = index % (p.h * p.w), block = inside / (merge * merge), rest = inside % (merge * merge);
  p.frame = index / (p.h * p.w);
  p.block_row = block / (p.w / merge) * merge;
  p.block_column = block % (p.w / merge) * merge;
  p.row_in_block = rest / merge;
  p.column_in_block = rest % merge;
  return p;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
