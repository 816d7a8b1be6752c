// Matrix products by fused multiply-add: C[m, n] (+)= A[m, k] · B[k, n] in fp32, for every instruction set.
#pragma once

#include "../common/simd.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

// What the products are added to: nothing; C; C with column j multiplied by scale[j]; or C, their own sum multiplied by
// scale[j]. They are summed by themselves first, which in long sums loses less than adding each to a large total.
enum Start { kZero, kKeep, kScale, kAddScaled };
constexpr bool kHasScale(Start start) { return start == kScale || start == kAddScaled; }

constexpr int kTileRows = 6;

struct FmaTile {
  using Element = float;
  static constexpr int kPair = 1;  // neighbours in k that lie together in B
  // Six rows of this many vectors are what the registers hold: 32 of them with AVX-512, else 16.
  static constexpr int kVectors = kLanes == 16 ? 4 : 2;

  template <int kRows, int kColumns, Start kStart>
  static void tile(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t steps,
                   const float* scale) {
    V sum[kRows][kColumns];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) sum[i][j] = set1(0.0f);
    }
    for (int64_t k = 0; k < steps; ++k, b += ldb, ++a) {
      V column[kColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) column[j] = load_vector(b + j * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const V x = set1(a[i * lda]);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) sum[i][j] = fma(x, column[j], sum[i][j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        float* at = c + i * ldc + j * kLanes;
        if constexpr (kStart == kKeep) sum[i][j] = sum[i][j] + load_vector(at);
        if constexpr (kStart == kScale) sum[i][j] = fma(load_vector(at), load_vector(scale + j * kLanes), sum[i][j]);
        if constexpr (kStart == kAddScaled) sum[i][j] = fma(sum[i][j], load_vector(scale + j * kLanes), load_vector(at));
        store_vector(at, sum[i][j]);
      }
    }
  }
};

// C [rows, vectors · kLanes] with `ldc` elements to a row; A [rows, steps · kPair] with `lda`; B [steps, columns, kPair]
// with `ldb` to a step. An element's sum runs over k in order, whatever the tile: its bits depend on nothing else.
template <typename Tile, Start kStart>
static void multiply(float* c, int64_t ldc, const typename Tile::Element* a, int64_t lda,
                     const typename Tile::Element* b, int64_t ldb, int64_t rows, int64_t vectors, int64_t steps,
                     const float* scale = nullptr) {
  for (int64_t j = 0; j < vectors; j += Tile::kVectors) {
    const int64_t width = vectors - j < Tile::kVectors ? vectors - j : Tile::kVectors;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t height = rows - i < kTileRows ? rows - i : kTileRows;
      float* target = c + i * ldc + j * kLanes;
      const auto* left = a + i * lda;
      const auto* right = b + j * kLanes * Tile::kPair;
      const float* factor = kHasScale(kStart) ? scale + j * kLanes : nullptr;
#define M4OV_TILE(m, n)                                                                                    \
  case m * 4 + n:                                                                                          \
    if constexpr (n <= Tile::kVectors) {                                                                   \
      Tile::template tile<m, n, kStart>(target, ldc, left, lda, right, ldb, steps, factor);                \
    }                                                                                                      \
    break;
#define M4OV_TILES(m) M4OV_TILE(m, 1) M4OV_TILE(m, 2) M4OV_TILE(m, 3) M4OV_TILE(m, 4)
      switch (height * 4 + width) {
        M4OV_TILES(1) M4OV_TILES(2) M4OV_TILES(3) M4OV_TILES(4) M4OV_TILES(5) M4OV_TILES(6)
      }
#undef M4OV_TILES
#undef M4OV_TILE
    }
  }
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
