// Vectors of bytes for pack_patches: weighted sums of byte rows, transposes, channels apart. Included by cpu_*.cpp only.
#pragma once

#include "../common/simd.h"

namespace m4ov {
namespace M4OV_VARIANT {

#if defined(__AVX512F__)
using Bytes = __m512i;
#define M4OV_BYTES(op) _mm512_##op
M4OV_INLINE Bytes load_vector(const uint8_t* p) { return _mm512_loadu_si512(p); }
M4OV_INLINE void store_vector(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x); }
M4OV_INLINE Bytes zero() { return _mm512_setzero_si512(); }
#elif defined(__AVX2__)
using Bytes = __m256i;
#define M4OV_BYTES(op) _mm256_##op
M4OV_INLINE Bytes load_vector(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
M4OV_INLINE void store_vector(uint8_t* p, Bytes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
M4OV_INLINE Bytes zero() { return _mm256_setzero_si256(); }
#else
using Bytes = __m128i;
#define M4OV_BYTES(op) _mm_##op
M4OV_INLINE Bytes load_vector(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
M4OV_INLINE void store_vector(uint8_t* p, Bytes x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }
M4OV_INLINE Bytes zero() { return _mm_setzero_si128(); }
#endif

constexpr int64_t kBytes = sizeof(Bytes);

// sum + the products of neighbouring 16-bit numbers, added in pairs.
M4OV_INLINE Bytes add_products(Bytes sum, Bytes pixels, Bytes weights) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, pixels, weights);
#else
  return M4OV_BYTES(add_epi32)(sum, M4OV_BYTES(madd_epi16)(pixels, weights));
#endif
}

// ---- Weighted sums of rows of bytes, as Pillow makes them

// A weight has kFractionBits binary places. Multipliers take 16 bits, so it comes as its low kSplitBits bits (not
// negative) and the rest; both as 16-bit numbers, those of two neighbouring rows in one int32.
constexpr int kFractionBits = 22, kSplitBits = 12;

// What stands in a table of weights for one output: where its inputs begin, how many pairs of them there are, and the
// low and high parts of each pair. An input beyond the last has weight 0.
struct Window {
  int32_t start, pairs;
  int32_t weights[];  // [pairs][2]
};

M4OV_INLINE Bytes rounded(Bytes low, Bytes high) {
  const Bytes sum = M4OV_BYTES(add_epi32)(low, M4OV_BYTES(slli_epi32)(high, kSplitBits));
  return M4OV_BYTES(srai_epi32)(sum, kFractionBits);
}

// One vector: row(i) is the address of its kBytes in the i-th row.
template <typename Row>
M4OV_INLINE Bytes weighted_sum(const Window& window, const Row& row) {
  const Bytes half = M4OV_BYTES(set1_epi32)(1 << (kFractionBits - 1));
  Bytes low[4] = {half, half, half, half}, high[4] = {zero(), zero(), zero(), zero()};
  for (int64_t pair = 0; pair < window.pairs; ++pair) {
    const Bytes a = load_vector(row(2 * pair)), b = load_vector(row(2 * pair + 1));
    const Bytes first = M4OV_BYTES(unpacklo_epi8)(a, b), second = M4OV_BYTES(unpackhi_epi8)(a, b);
    const Bytes pixels[4] = {
        M4OV_BYTES(unpacklo_epi8)(first, zero()), M4OV_BYTES(unpackhi_epi8)(first, zero()),
        M4OV_BYTES(unpacklo_epi8)(second, zero()), M4OV_BYTES(unpackhi_epi8)(second, zero())};
    const Bytes low_weights = M4OV_BYTES(set1_epi32)(window.weights[2 * pair]);
    const Bytes high_weights = M4OV_BYTES(set1_epi32)(window.weights[2 * pair + 1]);
    for (int i = 0; i < 4; ++i) {
      low[i] = add_products(low[i], pixels[i], low_weights);
      high[i] = add_products(high[i], pixels[i], high_weights);
    }
  }
  const Bytes first = M4OV_BYTES(packs_epi32)(rounded(low[0], high[0]), rounded(low[1], high[1]));
  const Bytes second = M4OV_BYTES(packs_epi32)(rounded(low[2], high[2]), rounded(low[3], high[3]));
  return M4OV_BYTES(packus_epi16)(first, second);
}

// `count` bytes at `target`, and up to kBytes - 1 more; `row(i)` may be read as far.
template <typename Row>
M4OV_INLINE void weigh_padded(uint8_t* target, int64_t count, const Window& window, const Row& row) {
  for (int64_t at = 0; at < count; at += kBytes) {
    store_vector(target + at, weighted_sum(window, [&](int64_t i) { return row(i) + at; }));
  }
}

// Neither writes nor reads more than `count` bytes of a row.
template <typename Row>
M4OV_INLINE void weigh_exactly(uint8_t* target, int64_t count, const Window& window, const Row& row) {
  const int64_t whole = count / kBytes * kBytes;
  weigh_padded(target, whole, window, row);
  if (whole == count) return;
  if (count >= kBytes) {  // once more, up to the end
    const int64_t at = count - kBytes;
    store_vector(target + at, weighted_sum(window, [&](int64_t i) { return row(i) + at; }));
    return;
  }
  for (int64_t at = 0; at < count; ++at) {
    int32_t low = 1 << (kFractionBits - 1), high = 0;
    for (int64_t i = 0; i < 2 * window.pairs; ++i) {
      const int64_t pixel = row(i)[at];
      const int shift = i % 2 * 16;
      low += pixel * static_cast<int16_t>(static_cast<uint32_t>(window.weights[i / 2 * 2]) >> shift);
      high += pixel * static_cast<int16_t>(static_cast<uint32_t>(window.weights[i / 2 * 2 + 1]) >> shift);
    }
    const int32_t value = (low + high * (1 << kSplitBits)) >> kFractionBits;
    target[at] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
  }
}

// ---- 16 bytes at a time, the same for every instruction set

M4OV_INLINE __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
M4OV_INLINE void store16(uint8_t* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }

// The transpose of 16 x 16 bytes. A perfect shuffle of all 256 bytes turns the eight bits of their number by one; four
// turns exchange row and column.
M4OV_INLINE void transpose16(__m128i (&rows)[16]) {
  for (int turn = 0; turn < 4; ++turn) {
    __m128i next[16];
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    }
    for (int i = 0; i < 16; ++i) rows[i] = next[i];
  }
}

// The channels of 16 pixels of kStep bytes each. Byte i of 16 kStep goes to 16 i mod (16 kStep - 1), which are four
// perfect shuffles. The fourth byte of a pixel is dropped.
template <int kStep>
M4OV_INLINE void split_channels(const uint8_t* p, __m128i (&channels)[3]) {
  if constexpr (kStep == 1) {
    channels[0] = load16(p);
  } else if constexpr (kStep == 3) {
    __m128i x[3] = {load16(p), load16(p + 16), load16(p + 32)};
    for (int turn = 0; turn < 4; ++turn) {
      const __m128i first = _mm_unpacklo_epi8(x[0], _mm_srli_si128(x[1], 8));
      const __m128i second = _mm_unpacklo_epi8(_mm_srli_si128(x[0], 8), x[2]);
      x[2] = _mm_unpackhi_epi8(_mm_slli_si128(x[1], 8), x[2]);
      x[0] = first;
      x[1] = second;
    }
    for (int c = 0; c < 3; ++c) channels[c] = x[c];
  } else {
    __m128i x[4] = {load16(p), load16(p + 16), load16(p + 32), load16(p + 48)};
    for (int turn = 0; turn < 4; ++turn) {
      const __m128i next[4] = {_mm_unpacklo_epi8(x[0], x[2]), _mm_unpackhi_epi8(x[0], x[2]),
                               _mm_unpacklo_epi8(x[1], x[3]), _mm_unpackhi_epi8(x[1], x[3])};
      for (int i = 0; i < 4; ++i) x[i] = next[i];
    }
    for (int c = 0; c < 3; ++c) channels[c] = x[c];
  }
}

// The next kGroup bytes as floats, in the order in which T is stored.
template <typename T>
M4OV_INLINE Pair widen(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (kSame<T, Bf16>) {
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {{_mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff)))},
            {_mm512_cvtepi32_ps(_mm512_srli_epi32(x, 16))}};
  } else {
    return {{_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16(p)))},
            {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16(p + 16)))}};
  }
#elif defined(__AVX2__)
  const __m256i x = _mm256_cvtepu8_epi16(load16(p));
  if constexpr (kSame<T, Bf16>) {
    return {{_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)))},
            {_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16))}};
  } else {
    return {{_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)))},
            {_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)))}};
  }
#else
  const __m128i none = _mm_setzero_si128();
  const __m128i x = _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), none);
  if constexpr (kSame<T, Bf16>) {
    return {{_mm_cvtepi32_ps(_mm_and_si128(x, _mm_set1_epi32(0xffff)))}, {_mm_cvtepi32_ps(_mm_srli_epi32(x, 16))}};
  } else {
    return {{_mm_cvtepi32_ps(_mm_unpacklo_epi16(x, none))}, {_mm_cvtepi32_ps(_mm_unpackhi_epi16(x, none))}};
  }
#endif
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
