// Laying tensors out for the matrix products, and fp32 results back: rows are of Bf16, Fp16 or float, panels of the
// tile's element. Missing rows and columns of a panel are zeros.
#pragma once

#include "tile_bf16.h"
#include "tile_fma.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

template <typename T>
static void widen(float* to, const T* from, int64_t count) {
  if constexpr (kSame<T, float>) {
    memcpy(to, from, count * sizeof(float));
  } else if constexpr (kSame<T, Bf16>) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
      memcpy(to + i, &bits, 4);
    }
  } else {
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) store(to + i, load(from + i));
    if (i < count) store_tail(to + i, load_tail(from + i, count - i), count - i);
  }
}

static void narrow_exact(Bf16* to, const float* from, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = from[i] * factor;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i].bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// Rounded to T (nearest even), times `factor`.
template <typename T>
static void narrow(T* to, const float* from, float factor, int64_t count) {
  if constexpr (kSame<T, Bf16>) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (const V times = set1(factor); i + kGroup <= count; i += kGroup) {
      const Pair x = load(from + i) * both(times);
      const __m512bh halves = _mm512_cvtne2ps_pbh(x.b.v, x.a.v);
      const __m512i bits = reinterpret_cast<const __m512i&>(halves);
      if (__builtin_expect(any_zero(bits), 0)) {  // or denormal
        narrow_exact(to + i, from + i, factor, kGroup);
      } else {
        _mm512_storeu_si512(to + i, bits);
      }
    }
#endif
    narrow_exact(to + i, from + i, factor, count - i);
  } else {
    const Pair times = both(set1(factor));
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) store(to + i, load(from + i) * times);
    if (i < count) store_tail(to + i, load_tail(from + i, count - i) * times, count - i);
  }
}

#ifdef __AVX512F__

// Rows of 16 words each become columns.
M4OV_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
    }
  }
  // r[4i + c]: of rows 4i to 4i+3, the words c, c+4, c+8, c+12.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

M4OV_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << (count > 0 ? count : 0)) - 1);
}
M4OV_INLINE __m512i load_words(const float* p, int64_t count) { return _mm512_maskz_loadu_epi32(first_lanes(count), p); }
M4OV_INLINE __m512i load_words(const Bf16* p, int64_t count) {  // pairs
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(count >= 32 ? 0xffffffffu : (1u << count) - 1), p);
}

#endif

// `rows[i]`, i < count, with `width` elements each → panel [width / kPair][columns][kPair], step `ldb`: row i is column i.
// `columns`: count rounded up to whole vectors.
template <typename Tile>
static void pack_columns(typename Tile::Element* panel, int64_t ldb, const typename Tile::Element* const* rows,
                         int64_t count, int64_t columns, int64_t width) {
  constexpr int64_t kPair = Tile::kPair;
#ifdef __AVX512F__
  constexpr int64_t kWords = 16 * kPair;  // elements in 16 words
  for (int64_t i = 0; i < columns; i += 16) {
    for (int64_t k = 0; k < width; k += kWords) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        r[j] = i + j < count ? load_words(rows[i + j] + k, width - k) : _mm512_setzero_si512();
      }
      transpose(r);
      const int64_t steps = (width - k < kWords ? width - k : kWords) / kPair;
      for (int64_t s = 0; s < steps; ++s) _mm512_storeu_si512(panel + (k / kPair + s) * ldb + i * kPair, r[s]);
    }
  }
#else
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t k = 0; k < width; ++k) {
      panel[(k / kPair) * ldb + i * kPair + k % kPair] = i < count ? rows[i][k] : typename Tile::Element{};
    }
  }
#endif
}

// `rows[i]`, i < count → panel [ceil(count / kPair)][columns][kPair], step `ldb`: column j holds the elements j.
template <typename Tile>
static void pack_steps(typename Tile::Element* panel, int64_t ldb, const typename Tile::Element* const* rows,
                       int64_t count, int64_t columns, int64_t width) {
#ifdef __AVX512BF16__
  if constexpr (Tile::kPair == 2) {
    for (int64_t i = 0; i < count; i += 2) {
      for (int64_t j = 0; j < columns; j += 16) {
        const __mmask16 lanes = first_lanes(width - j);
        const __m256i even = _mm256_maskz_loadu_epi16(lanes, rows[i] + j);
        const __m256i odd = i + 1 < count ? _mm256_maskz_loadu_epi16(lanes, rows[i + 1] + j) : _mm256_setzero_si256();
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
        _mm512_storeu_si512(panel + i / 2 * ldb + 2 * j, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
      }
    }
    return;
  }
#endif
  if constexpr (Tile::kPair == 1) {
    for (int64_t i = 0; i < count; ++i) {
      memcpy(panel + i * ldb, rows[i], width * sizeof(float));
      for (int64_t j = width; j < columns; ++j) panel[i * ldb + j] = 0.0f;
    }
  }
}

// `count` rows, `stride` elements apart → panel [width][columns], `lda` to a row: row i is column i, up to `columns`,
// which is count rounded up to whole pairs.
template <typename Tile>
static void pack_transposed(typename Tile::Element* panel, int64_t lda, const typename Tile::Element* rows,
                            int64_t stride, int64_t count, int64_t columns, int64_t width) {
#ifdef __AVX512F__
  constexpr int64_t kPair = Tile::kPair;
  for (int64_t i = 0; i < columns; i += 16 * kPair) {
    const int64_t here = columns - i < 16 * kPair ? columns - i : 16 * kPair;
    for (int64_t k = 0; k < width; k += 16) {
      __m512i r[16];
      const __mmask16 lanes = first_lanes(width - k);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        const int64_t row = i + j * kPair;
        r[j] = _mm512_setzero_si512();
        if constexpr (kPair == 1) {
          if (row < count) r[j] = _mm512_maskz_loadu_epi32(lanes, rows + row * stride + k);
        } else {
          if (row < count) r[j] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, rows + row * stride + k));
          if (row + 1 < count) {
            const __m256i odd = _mm256_maskz_loadu_epi16(lanes, rows + (row + 1) * stride + k);
            r[j] = _mm512_or_si512(r[j], _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
          }
        }
      }
      transpose(r);
      const int64_t some = width - k < 16 ? width - k : 16;
      const __mmask16 words = first_lanes(here / kPair);
      for (int64_t s = 0; s < some; ++s) _mm512_mask_storeu_epi32(panel + (k + s) * lda + i, words, r[s]);
    }
  }
#else
  for (int64_t k = 0; k < width; ++k) {
    for (int64_t i = 0; i < columns; ++i) panel[k * lda + i] = i < count ? rows[i * stride + k] : 0.0f;
  }
#endif
}

// fp32 [width][columns], `ldc` to a row → the first `count` columns as rows [count][width], `stride` elements apart.
[[maybe_unused]] static void unpack_columns(float* rows, int64_t stride, const float* c, int64_t ldc, int64_t count, int64_t width) {
#ifdef __AVX512F__
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t here = count - i < 16 ? count - i : 16;
    for (int64_t k = 0; k < width; k += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        r[j] = k + j < width ? load_words(c + (k + j) * ldc + i, here) : _mm512_setzero_si512();
      }
      transpose(r);
      const __mmask16 words = first_lanes(width - k);
      for (int64_t s = 0; s < here; ++s) _mm512_mask_storeu_epi32(rows + (i + s) * stride + k, words, r[s]);
    }
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < width; ++k) rows[i * stride + k] = c[k * ldc + i];
  }
#endif
}

// Two rows of numbers as one row of pairs, rounded to the tile's element; and a row by itself.
M4OV_INLINE void put_pairs(float* to, V x, V) { store_vector(to, x); }
M4OV_INLINE void put_row(float* to, V x) { store_vector(to, x); }
#ifdef __AVX512BF16__
M4OV_INLINE void put_pairs(Bf16* to, V even, V odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh both = _mm512_cvtne2ps_pbh(odd.v, even.v);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, reinterpret_cast<const __m512i&>(both)));
}
M4OV_INLINE void put_row(Bf16* to, V x) {
  const __m256bh bits = _mm512_cvtneps_pbh(x.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(bits));
}
#endif

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
