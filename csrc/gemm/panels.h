// Writing a weight's panels, whose layout m4ov_kernels/gemm/panels.py has: which rows are in one, and words of rows in its
// order.
#pragma once

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kPanel = 64;  // output features

struct PanelRows {
  int64_t all, half, paired;  // half: of paired panels, which are in turn of the first half and of the second

  PanelRows(int64_t rows, bool paired) : all(rows), half(paired ? rows / 2 : rows), paired(paired) {}

  int64_t count() const { return blocks_of(half, kPanel) * (paired ? 2 : 1); }
  int64_t first(int64_t panel) const { return paired ? panel % 2 * half + panel / 2 * kPanel : panel * kPanel; }
  int64_t rows(int64_t panel) const { return smaller(kPanel, half - (paired ? panel / 2 : panel) * kPanel); }
};

// Sixteen words of four rows, each in its row, to columns.
struct Words {
  __m128i at[4];
};
M4OV_INLINE Words transposed(const uint8_t* from, int64_t stride) {
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  const __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpackhi_epi32(x[0], x[1]);
  const __m128i c = _mm_unpacklo_epi32(x[2], x[3]), d = _mm_unpackhi_epi32(x[2], x[3]);
  return {{_mm_unpacklo_epi64(a, c), _mm_unpackhi_epi64(a, c), _mm_unpacklo_epi64(b, d), _mm_unpackhi_epi64(b, d)}};
}
M4OV_INLINE __m128i low_halves(__m128i x, __m128i y) {
  return _mm_packs_epi32(_mm_srai_epi32(_mm_slli_epi32(x, 16), 16), _mm_srai_epi32(_mm_slli_epi32(y, 16), 16));
}
M4OV_INLINE __m128i high_halves(__m128i x, __m128i y) {
  return _mm_packs_epi32(_mm_srai_epi32(x, 16), _mm_srai_epi32(y, 16));
}
M4OV_INLINE void put_word(uint8_t* to, __m128i x) { _mm_store_si128(reinterpret_cast<__m128i*>(to), x); }

// A tile of 64 rows, kTileRow bytes each, to the words of all rows one after the other.
template <int64_t kWordBytes, int64_t kTileRow>
static void put_in_order(uint8_t* to, const uint8_t* tile) {
  constexpr int64_t kStep = kPanel * kWordBytes, kWords = kTileRow / kWordBytes;
  if constexpr (kWordBytes == 2) {
    for (int64_t word = 0; word < kWords; word += 8) {
      for (int64_t f = 0; f < kPanel; f += 8) {
        const uint8_t* from = tile + f * kTileRow + word * kWordBytes;
        const Words x = transposed(from, kTileRow), y = transposed(from + 4 * kTileRow, kTileRow);
        uint8_t* place = to + word * kStep + f * kWordBytes;
        for (int i = 0; i < 4; ++i) {
          put_word(place + 2 * i * kStep, low_halves(x.at[i], y.at[i]));
          put_word(place + (2 * i + 1) * kStep, high_halves(x.at[i], y.at[i]));
        }
      }
    }
  } else {
    for (int64_t word = 0; word < kWords; word += 4) {
      for (int64_t f = 0; f < kPanel; f += 4) {
        const Words x = transposed(tile + f * kTileRow + word * kWordBytes, kTileRow);
        uint8_t* place = to + word * kStep + f * kWordBytes;
        for (int i = 0; i < 4; ++i) put_word(place + i * kStep, x.at[i]);
      }
    }
  }
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
