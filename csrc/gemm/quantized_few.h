// Products of a few rows with codes of four bits or e4m3: decoded in registers as they stream from memory, whose bandwidth
// is the limit. The sums are those of the tiles, in their order: a row's bits don't depend on how many there are.
#pragma once

#include "quantized_input.h"

#ifdef __AVX512BF16__

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kFewRows = 4;
// Bytes: past the end of the page, where the processor's own prefetching stops, to L2, and from there to L1. (One core of
// a Zen 4, cold: 28 GB/s with one prefetch at 4096, 30 to 31 so. Decoding alone, from L2, takes 32: shifts, permutations
// and products share three ports. Two panels at a time: 21.)
constexpr int64_t kFarAhead = 16384, kAhead = 2048;

template <QuantizedKind kKind, bool kZeros>
struct Stream {
  static constexpr int kPairs = kKind == kInt4 ? 4 : 1;  // of places, in a step
  Nibbles<kZeros> nibbles;
  Eighths eighths;

  // Feature vector v of a step, its pair j of places.
  __attribute__((always_inline)) __m512i words(const uint8_t* step, int v) const {
    if constexpr (kKind == kInt4) return _mm512_loadu_si512(step + 64 * v);
    return eighths.of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(step + 32 * v)));
  }
  __attribute__((always_inline)) __m512i pair(__m512i words, int j, __m512i rest) const {
    if constexpr (kKind == kInt4) return nibbles.at(words, j, rest);
    return words;
  }
};

// c [kRows][64] = the products of a panel with all tokens, of which there are kRows.
template <QuantizedKind kKind, bool kZeros, int kRows, typename Left>
static void few_rows(float* c, const Left& left, int64_t panel, const uint8_t* codes) {
  const QuantizedLinear& a = left.a;
  const Stream<kKind, kZeros> stream;
  __m512 total[kRows][4] = {};
  for (int64_t begin = 0; begin < a.places;) {
    const Segment segment = segment_at<Left::kPlaces>(a, begin);
    const uint8_t* zeros = kZeros ? a.zeros + (panel * a.groups + segment.group) * kPanel : codes;
    __m512i rest[4];
    for (int v = 0; v < 4; ++v) rest[v] = Nibbles<kZeros>::rest(zeros + 16 * v);
    const Bf16* x[kRows];
    for (int i = 0; i < kRows; ++i) x[i] = left.rows(segment, i);
    __m512 sum[kRows][4] = {};
    for (int64_t s = 0; s < segment.count / kStepPlaces<kKind>; ++s, codes += kStepBytes<kKind>) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kStepBytes<kKind>; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes) + kFarAhead + i, _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead + i, _MM_HINT_T0);
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512i words = stream.words(codes, v);
#pragma GCC unroll 4
        for (int j = 0; j < Stream<kKind, kZeros>::kPairs; ++j) {
          const __m512i pair = stream.pair(words, j, rest[v]);
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            int32_t two;
            memcpy(&two, x[i] + (s * Stream<kKind, kZeros>::kPairs + j) * 2, 4);
            const __m512i both = _mm512_set1_epi32(two);
            sum[i][v] = _mm512_dpbf16_ps(sum[i][v], reinterpret_cast<const __m512bh&>(pair),
                                         reinterpret_cast<const __m512bh&>(both));
          }
        }
      }
    }
    float scale[kPanel];
    widen_scales(scale, a, panel, segment.group);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        total[i][v] = _mm512_fmadd_ps(sum[i][v], _mm512_loadu_ps(scale + 16 * v), total[i][v]);
      }
    }
    begin += segment.count;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 4; ++v) _mm512_storeu_ps(c + i * kPanel + 16 * v, total[i][v]);
  }
}

template <QuantizedKind kKind, bool kZeros, typename Left>
static void few_rows(float* c, const Left& left, int64_t panel, const uint8_t* codes) {
  switch (left.a.tokens) {
    case 1:
      return few_rows<kKind, kZeros, 1>(c, left, panel, codes);
    case 2:
      return few_rows<kKind, kZeros, 2>(c, left, panel, codes);
    case 3:
      return few_rows<kKind, kZeros, 3>(c, left, panel, codes);
    default:
      return few_rows<kKind, kZeros, 4>(c, left, panel, codes);
  }
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov

#endif
