// Quantised weights as right operands: segments of a panel, 64 features by some places, unpacked into L1 while all rows of
// the input pass by.
//
// A product is exact until it is summed: codes less their zero points are integers, and e4m3 has three bits of mantissa, so
// that bf16 and fp32 hold both. Scales come in fp32, once for each segment: the weight is nowhere rounded.
#pragma once

#include <type_traits>

#include "../common/pack.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/tile_int8.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kPanel = 64;  // features

// Unsigned codes by a signed input in int32 (tile_int8.h); the other tiles are those of tile_bf16.h and tile_fma.h.
struct BytesTile {
  using Element = int8_t;
  static constexpr int kPair = 4;
};

// At most so many places in a segment: unpacked they are 8 KiB of bytes or 16 KiB of bf16 or fp32, beside which rows of
// the input pass through L1. Codes of eight bits are multiplied where they lie: the longer, the fewer sums in fp32.
template <typename Tile, QuantizedKind kKind>
constexpr int64_t kSegment = kSame<Tile, FmaTile> ? 64 : kSame<Tile, BytesTile> && kKind == kInt8 ? 2048 : 128;

// A step of a panel: the places that lie together for each of its features.
template <QuantizedKind kKind>
constexpr int64_t kStepPlaces = kKind == kInt4 ? 8 : kKind == kInt8 ? 4 : 2;
template <QuantizedKind kKind>
constexpr int64_t kStepBytes = kKind == kFp8 ? 2 * kPanel : 4 * kPanel;

struct Segment {
  int64_t begin, count, group;
};
// The one that begins at a place: it ends where its group does, or is full.
template <int64_t kPlaces>
M4OV_INLINE Segment segment_at(const QuantizedLinear& a, int64_t begin) {
  const int64_t group = begin / a.group;
  const int64_t end = smaller(smaller((group + 1) * a.group, a.places), begin + kPlaces);
  return {begin, end - begin, group};
}

// The scales of a panel's features in one group.
M4OV_INLINE void widen_scales(float* to, const QuantizedLinear& a, int64_t panel, int64_t group) {
  const int64_t at = (panel * a.groups + group) * kPanel;
  with_dtype(a.scale_dtype, [&](auto tag) {
    widen(to, static_cast<const typename decltype(tag)::type*>(a.scales) + at, kPanel);
  });
}

#ifdef __AVX512BF16__

// For each of 16 features, in all the fields of `bits` bits of its word: 15 less the zero point.
M4OV_INLINE __m512i rest_of_zeros(const uint8_t* zeros, int32_t ones) {
  const __m512i z = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
  return _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(15), z), _mm512_set1_epi32(ones));
}

// Four-bit codes as bf16, by table: of a word of eight, those at j and 4 + j together. Without zero points a code means
// code - 8, and what lies above it in the table's index of five bits doesn't matter: the table holds everything twice.
template <bool kZeros>
struct Nibbles {
  __m512i table;

  Nibbles() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>(kZeros ? i - 15 : i % 16 - 8);
      uint32_t bits;
      memcpy(&bits, &value, 4);
      values[i] = static_cast<uint16_t>(bits >> 16);
    }
    table = _mm512_load_si512(values);
  }

  static __m512i rest(const uint8_t* zeros) { return kZeros ? rest_of_zeros(zeros, 0x00010001) : _mm512_setzero_si512(); }

  __attribute__((always_inline)) __m512i at(__m512i words, int j, __m512i rest) const {
    __m512i index = j ? _mm512_srli_epi16(words, 4 * j) : words;
    if constexpr (kZeros) index = _mm512_add_epi16(_mm512_and_si512(index, _mm512_set1_epi16(15)), rest);
    return _mm512_permutexvar_epi16(index, table);
  }
};

// e4m3 as bf16: the exponent moves over, and by table where it is zero and the number denormal.
struct Eighths {
  __m512i denormal;

  Eighths() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>(i % 8) / 512;
      uint32_t bits;
      memcpy(&bits, &value, 4);
      values[i] = static_cast<uint16_t>(bits >> 16);
    }
    denormal = _mm512_load_si512(values);
  }

  __attribute__((always_inline)) __m512i of(__m256i bytes) const {
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    const __mmask32 small = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x78));
    const __m512i magnitude = _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x7f)), 4);
    __m512i value = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
    value = _mm512_mask_permutexvar_epi16(value, small, wide, denormal);
    // value | the sign
    return _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(wide, 8), _mm512_set1_epi16(-0x8000), 0xf8);
  }
};

// The segment after this one comes from memory while rows pass by.
M4OV_INLINE void prefetch_next(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line) + 4096, _MM_HINT_T1);
}

template <bool kZeros>
static void unpack_int4(Bf16* to, const uint8_t* codes, const uint8_t* zeros, int64_t places) {
  const Nibbles<kZeros> nibbles;
  __m512i rest[4];
  for (int v = 0; v < 4; ++v) rest[v] = Nibbles<kZeros>::rest(zeros + 16 * v);
  for (int64_t s = 0; s < places / 8; ++s, codes += kStepBytes<kInt4>, to += 8 * kPanel) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i words = _mm512_loadu_si512(codes + 64 * v);
      prefetch_next(codes + 64 * v);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm512_store_si512(to + j * 2 * kPanel + 32 * v, nibbles.at(words, j, rest[v]));
    }
  }
}

template <bool kZeros>
static void unpack_int4(uint8_t* to, const uint8_t* codes, const uint8_t* zeros, int64_t places) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i rest[4];
  for (int v = 0; v < 4; ++v) rest[v] = kZeros ? rest_of_zeros(zeros + 16 * v, 0x01010101) : _mm512_setzero_si512();
  for (int64_t s = 0; s < places / 8; ++s, codes += kStepBytes<kInt4>, to += 8 * kPanel) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i words = _mm512_loadu_si512(codes + 64 * v);
      prefetch_next(codes + 64 * v);
      __m512i even = _mm512_and_si512(words, low), odd = _mm512_and_si512(_mm512_srli_epi16(words, 4), low);
      if constexpr (kZeros) even = _mm512_add_epi8(even, rest[v]), odd = _mm512_add_epi8(odd, rest[v]);
      _mm512_store_si512(to + 64 * v, even);
      _mm512_store_si512(to + 4 * kPanel + 64 * v, odd);
    }
  }
}

static void unpack_fp8(Bf16* to, const uint8_t* codes, int64_t places) {
  const Eighths eighths;
  for (int64_t i = 0; i < places * kPanel; i += 64) {
    prefetch_next(codes + i + 4096);  // a segment is 8 KiB
#pragma GCC unroll 2
    for (int half = 0; half < 64; half += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i + half));
      _mm512_store_si512(to + i + half, eighths.of(bytes));
    }
  }
}

#endif

// As fp32, a row of 64 to each place.
template <QuantizedKind kKind>
static void unpack_wide(float* to, const uint8_t* codes, const uint8_t* zeros, int64_t places) {
  constexpr int64_t kPlaces = kStepPlaces<kKind>;
  for (int64_t step = 0; step < places / kPlaces; ++step, codes += kStepBytes<kKind>) {
    for (int64_t j = 0; j < kPlaces; ++j, to += kPanel) {
      for (int64_t n = 0; n < kPanel; ++n) {
        if constexpr (kKind == kFp8) {
          const uint32_t code = codes[2 * n + j], magnitude = code & 0x7f;
          const uint32_t normal = (magnitude << 20) + (120u << 23), sign = (code & 0x80) << 24;
          const float denormal = static_cast<float>(static_cast<int32_t>(magnitude)) * (1.0f / 512);
          uint32_t bits;
          memcpy(&bits, &denormal, 4);
          bits = (magnitude < 8 ? bits : normal) | sign;
          memcpy(to + n, &bits, 4);
        } else {
          uint32_t word;
          memcpy(&word, codes + 4 * n, 4);
          if constexpr (kKind == kInt4) {
            const int32_t zero = zeros ? zeros[n] : 8;
            to[n] = static_cast<float>(static_cast<int32_t>(word >> (4 * j) & 15) - zero);
          } else {
            to[n] = static_cast<float>(static_cast<int32_t>(word >> (8 * j) & 255) - 128);
          }
        }
      }
    }
  }
}

// A segment as right operand of a tile, in `to` or where it lies.
template <typename Tile, QuantizedKind kKind, typename E>
static const E* unpack(E* to, const uint8_t* codes, const uint8_t* zeros, int64_t places) {
  if constexpr (kSame<Tile, FmaTile>) {
    unpack_wide<kKind>(to, codes, zeros, places);
    return to;
  } else if constexpr (kKind == kInt8) {
    return codes;
#ifdef __AVX512BF16__
  } else if constexpr (kKind == kFp8) {
    unpack_fp8(to, codes, places);
    return to;
  } else {
    if (zeros) {
      unpack_int4<true>(to, codes, zeros, places);
    } else {
      unpack_int4<false>(to, codes, codes, places);
    }
    return to;
#endif
  }
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
