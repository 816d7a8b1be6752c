// Numbers to codes: the exact quotient by a scale, rounded to int8 or to e4m3, and the largest magnitude of a row.
//
// Elements go in pairs of vectors: those at even places, and those at odd ones, so that the codes of both lie side by
// side in the 32-bit lanes in the end. All that is here gives the same bits on every instruction set.
#pragma once

#include "../common/parallel.h"
#include "../common/scratch.h"

namespace m4ov {
namespace M4OV_VARIANT {

// ---- Vectors of 32-bit integers

#if defined(__AVX512F__)
struct I {
  __m512i v;
};
M4OV_INLINE I ints(int x) { return {_mm512_set1_epi32(x)}; }
M4OV_INLINE I as_ints(V x) { return {_mm512_castps_si512(x.v)}; }
M4OV_INLINE V as_floats(I x) { return {_mm512_castsi512_ps(x.v)}; }
M4OV_INLINE I operator+(I x, I y) { return {_mm512_add_epi32(x.v, y.v)}; }
M4OV_INLINE I operator&(I x, I y) { return {_mm512_and_si512(x.v, y.v)}; }
template <int kBy>
M4OV_INLINE I right(I x) {
  return {_mm512_srli_epi32(x.v, kBy)};
}
template <int kBy>
M4OV_INLINE I left(I x) {
  return {_mm512_slli_epi32(x.v, kBy)};
}
M4OV_INLINE I select(I mask, I yes, I no) { return {_mm512_ternarylogic_epi32(mask.v, yes.v, no.v, 0xca)}; }
M4OV_INLINE I rounded(V x) { return {_mm512_cvtps_epi32(x.v)}; }
// The lower half of every lane, and the lowest quarter.
template <bool kStream>
M4OV_INLINE void put_halves(uint8_t* p, I x) {
  const __m256i halves = _mm512_cvtepi32_epi16(x.v);
  kStream ? _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves)
          : _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
M4OV_INLINE void put_quarters(uint8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
using Bits = __m512i;
M4OV_INLINE void stream_any(void* p, Bits x) { _mm512_stream_si512(static_cast<__m512i*>(p), x); }
M4OV_INLINE Bits no_bits() { return _mm512_setzero_si512(); }
M4OV_INLINE Bits load_any(const void* p) { return _mm512_loadu_si512(p); }
M4OV_INLINE Bits magnitudes16(Bits x) { return _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)); }
M4OV_INLINE Bits magnitudes32(Bits x) { return _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)); }
M4OV_INLINE Bits max16(Bits x, Bits y) { return _mm512_max_epi16(x, y); }
M4OV_INLINE Bits max32(Bits x, Bits y) { return _mm512_max_epi32(x, y); }
M4OV_INLINE __m128i max16(__m128i x, __m128i y) { return _mm_max_epi16(x, y); }
M4OV_INLINE __m128i max32(__m128i x, __m128i y) { return _mm_max_epi32(x, y); }
M4OV_INLINE __m128i fold16(Bits x) {
  const __m256i y = _mm256_max_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  return _mm_max_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
M4OV_INLINE __m128i fold32(Bits x) {
  const __m256i y = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  return _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
#elif defined(__AVX2__)
struct I {
  __m256i v;
};
M4OV_INLINE I ints(int x) { return {_mm256_set1_epi32(x)}; }
M4OV_INLINE I as_ints(V x) { return {_mm256_castps_si256(x.v)}; }
M4OV_INLINE V as_floats(I x) { return {_mm256_castsi256_ps(x.v)}; }
M4OV_INLINE I operator+(I x, I y) { return {_mm256_add_epi32(x.v, y.v)}; }
M4OV_INLINE I operator&(I x, I y) { return {_mm256_and_si256(x.v, y.v)}; }
template <int kBy>
M4OV_INLINE I right(I x) {
  return {_mm256_srli_epi32(x.v, kBy)};
}
template <int kBy>
M4OV_INLINE I left(I x) {
  return {_mm256_slli_epi32(x.v, kBy)};
}
M4OV_INLINE I select(I mask, I yes, I no) {
  return {_mm256_or_si256(_mm256_and_si256(mask.v, yes.v), _mm256_andnot_si256(mask.v, no.v))};
}
M4OV_INLINE I rounded(V x) { return {_mm256_cvtps_epi32(x.v)}; }
template <bool kStream>
M4OV_INLINE void put_halves(uint8_t* p, I x) {
  const __m256i low = _mm256_and_si256(x.v, _mm256_set1_epi32(0xffff));
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  kStream ? _mm_stream_si128(reinterpret_cast<__m128i*>(p), halves)
          : _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
M4OV_INLINE void put_quarters(uint8_t* p, I x) {
  const __m256i low = _mm256_and_si256(x.v, _mm256_set1_epi32(0xff));
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
using Bits = __m256i;
M4OV_INLINE void stream_any(void* p, Bits x) { _mm256_stream_si256(static_cast<__m256i*>(p), x); }
M4OV_INLINE Bits no_bits() { return _mm256_setzero_si256(); }
M4OV_INLINE Bits load_any(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
M4OV_INLINE Bits magnitudes16(Bits x) { return _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)); }
M4OV_INLINE Bits magnitudes32(Bits x) { return _mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff)); }
M4OV_INLINE Bits max16(Bits x, Bits y) { return _mm256_max_epi16(x, y); }
M4OV_INLINE Bits max32(Bits x, Bits y) { return _mm256_max_epi32(x, y); }
M4OV_INLINE __m128i max16(__m128i x, __m128i y) { return _mm_max_epi16(x, y); }
M4OV_INLINE __m128i max32(__m128i x, __m128i y) { return _mm_max_epi32(x, y); }
M4OV_INLINE __m128i fold16(Bits x) {
  return _mm_max_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
M4OV_INLINE __m128i fold32(Bits x) {
  return _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
#else
struct I {
  __m128i v;
};
M4OV_INLINE I ints(int x) { return {_mm_set1_epi32(x)}; }
M4OV_INLINE I as_ints(V x) { return {_mm_castps_si128(x.v)}; }
M4OV_INLINE V as_floats(I x) { return {_mm_castsi128_ps(x.v)}; }
M4OV_INLINE I operator+(I x, I y) { return {_mm_add_epi32(x.v, y.v)}; }
M4OV_INLINE I operator&(I x, I y) { return {_mm_and_si128(x.v, y.v)}; }
template <int kBy>
M4OV_INLINE I right(I x) {
  return {_mm_srli_epi32(x.v, kBy)};
}
template <int kBy>
M4OV_INLINE I left(I x) {
  return {_mm_slli_epi32(x.v, kBy)};
}
M4OV_INLINE I select(I mask, I yes, I no) { return {select(mask.v, yes.v, no.v)}; }
M4OV_INLINE I rounded(V x) { return {_mm_cvtps_epi32(x.v)}; }
M4OV_INLINE __m128i low_halves(I x) {  // the pack saturates signed numbers: sign-extend the 16 bits first
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32(x.v, 16), 16);
  return _mm_packs_epi32(extended, extended);
}
template <bool kStream>
M4OV_INLINE void put_halves(uint8_t* p, I x) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low_halves(x));
}
M4OV_INLINE void put_quarters(uint8_t* p, I x) {
  const __m128i halves = low_halves(x & ints(0xff));
  const int quarters = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
  memcpy(p, &quarters, sizeof quarters);
}
using Bits = __m128i;
M4OV_INLINE void stream_any(void* p, Bits x) { _mm_stream_si128(static_cast<__m128i*>(p), x); }
M4OV_INLINE Bits no_bits() { return _mm_setzero_si128(); }
M4OV_INLINE Bits load_any(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
M4OV_INLINE Bits magnitudes16(Bits x) { return _mm_and_si128(x, _mm_set1_epi16(0x7fff)); }
M4OV_INLINE Bits magnitudes32(Bits x) { return _mm_and_si128(x, _mm_set1_epi32(0x7fffffff)); }
M4OV_INLINE Bits max16(Bits x, Bits y) { return _mm_max_epi16(x, y); }
M4OV_INLINE Bits max32(Bits x, Bits y) { return select(_mm_cmpgt_epi32(x, y), x, y); }
M4OV_INLINE __m128i fold16(Bits x) { return x; }
M4OV_INLINE __m128i fold32(Bits x) { return x; }
#endif

constexpr int kCodes = kGroup;               // codes that one pair of vectors makes
constexpr bool kStreams = kLanes > 4;        // half a register is too little to write past the caches

namespace {  // nothing that the linker could share between variants

// Bytes from the cache past it: a multiple of 64, to a line's beginning.
M4OV_INLINE void stream_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kVectorBytes) stream_any(to + i, load_any(from + i));
}

// ---- The largest magnitude, by its bits: the order of magnitudes, infinity, NaN is that of their bits.

constexpr uint32_t kInfinite = 0x7f800000;  // in fp32; magnitudes whose bits are not below are not finite

template <typename T>
struct Largest {
  static constexpr int64_t kMany = kVectorBytes / sizeof(T);
  Bits bits = no_bits();

  void add(Bits x) {
    bits = sizeof(T) == 2 ? max16(bits, magnitudes16(x)) : max32(bits, magnitudes32(x));
  }
  // kAhead: the hardware's prefetchers stop at page ends; this keeps reads going across them.
  template <bool kAhead = false>
  void add(const T* x, int64_t count) {
    Bits other = no_bits();
    int64_t i = 0;
    for (; i + 2 * kMany <= count; i += 2 * kMany) {
      if constexpr (kAhead) prefetch(x + i + 2048 / sizeof(T));
      const Bits first = load_any(x + i), second = load_any(x + i + kMany);
      bits = sizeof(T) == 2 ? max16(bits, magnitudes16(first)) : max32(bits, magnitudes32(first));
      other = sizeof(T) == 2 ? max16(other, magnitudes16(second)) : max32(other, magnitudes32(second));
    }
    bits = sizeof(T) == 2 ? max16(bits, other) : max32(bits, other);
    for (; i + kMany <= count; i += kMany) add(load_any(x + i));
    if (i < count) {
      char rest[kVectorBytes] = {};
      memcpy(rest, x + i, (count - i) * sizeof(T));
      add(load_any(rest));
    }
  }
  // Its bits as a number of fp32, which holds every T.
  uint32_t value() const {
    __m128i x = sizeof(T) == 2 ? fold16(bits) : fold32(bits);
    if constexpr (sizeof(T) == 2) {
      x = max16(x, _mm_srli_si128(x, 8));
      x = max16(x, _mm_srli_si128(x, 4));
      x = max16(x, _mm_srli_si128(x, 2));
      const uint32_t half = static_cast<uint32_t>(_mm_cvtsi128_si32(x)) & 0xffff;
      return kSame<T, Bf16> ? half << 16 : widened(half);
    } else {
      x = max32(x, _mm_srli_si128(x, 8));
      x = max32(x, _mm_srli_si128(x, 4));
      return static_cast<uint32_t>(_mm_cvtsi128_si32(x));
    }
  }
  static uint32_t widened(uint32_t half) {  // a magnitude of fp16
    if (half >= 0x7c00) return kInfinite | (half & 0x3ff) << 13;
    if (half >= 0x400) return (half << 13) + ((127 - 15) << 23);
    const float subnormal = static_cast<float>(half) * 0x1p-24f;
    uint32_t bits;
    memcpy(&bits, &subnormal, sizeof bits);
    return bits;
  }
};

template <typename T>
static uint32_t largest_of(const T* x, int64_t count) {
  Largest<T> found;
  found.add(x, count);
  return found.value();
}

static float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- Quotients

#ifdef __FMA__
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
// Scales from which on the remainder below is exact, wherever the quotient decides about a code.
constexpr float kLeastScale = 0x1p-90f;

// x / scale, rounded as a division rounds it wherever that makes a difference to the codes: the quotient by the rounded
// reciprocal, corrected once by its exact remainder, could differ from the division's only next to a number between two
// codes, and there it does not (all 730 such cases of a half below 130, which e4m3's are too, have been tried).
struct Divisor {
  V scale, minus, reciprocal;
};
M4OV_INLINE Divisor divisor(float scale, float reciprocal) { return {set1(scale), set1(-scale), set1(reciprocal)}; }
M4OV_INLINE Divisor divisor(float scale) { return divisor(scale, 1.0f / scale); }

template <bool kDivide>
M4OV_INLINE V quotient(V x, const Divisor& by) {
  if constexpr (kDivide || !kFused) {
    return x / by.scale;
  } else {
    const V near = x * by.reciprocal;
    return fma(fma(near, by.minus, x), by.reciprocal, near);
  }
}

// ---- Codes, in the low 8 bits of every lane

enum Kind { kToInt8, kToE4m3, kToInt8Panel, kToInt4 };

constexpr float kLargestE4m3 = 448.0f;

// |q| at most 464, the middle between the largest e4m3, 448, and what would follow. Adding 2^(20 + exponent of q), or of
// the smallest normal e4m3, leaves the significand's four bits, rounded half to even, at the end of the sum, and its
// exponent (120 less would be e4m3's) 20 bits above: their sum is the code. 152 makes up for the difference of the biases.
M4OV_INLINE V beside_e4m3(V q) {
  const V unit = as_floats((as_ints(q) & ints(0x7f800000)) + ints((20 << 23) + 152));
  return max(as_floats(ints(((14 + 127) << 23) + 152)), unit);
}
M4OV_INLINE I e4m3(V q, V sign) {
  const I sum = as_ints(magnitude(q) + beside_e4m3(q));
  return select(ints(0x80), right<24>(as_ints(sign)), sum + right<20>(sum));
}
// The number that e4m3(q, q) stands for.
M4OV_INLINE V nearest_e4m3(V q) {
  const V beside = beside_e4m3(q), rounded = magnitude(q) + beside - beside;
  return as_floats(select(ints(INT32_MIN), as_ints(q), as_ints(rounded)));
}

template <Kind kKind, bool kDivide>
M4OV_INLINE I code(V x, const Divisor& by) {
  const V q = quotient<kDivide>(x, by);
  if constexpr (kKind == kToE4m3) return e4m3(q, x);
  if constexpr (kKind == kToInt8) return rounded(q);
  if constexpr (kKind == kToInt8Panel) return rounded(max(set1(-128.0f), min(set1(127.0f), q))) + ints(128);
  return rounded(max(set1(-8.0f), min(set1(7.0f), q))) + ints(8);
}

template <typename T>
M4OV_INLINE Pair even_odd(Pair loaded) {
  return kSame<T, Bf16> ? loaded : deinterleave(loaded);
}

// Two codes of 8 bits side by side, or two of 4.
template <Kind kKind, bool kDivide>
M4OV_INLINE I codes_of(Pair x, const Divisor& by) {
  const I even = code<kKind, kDivide>(x.a, by), odd = code<kKind, kDivide>(x.b, by);
  if constexpr (kKind == kToInt4) {
    return even + left<4>(odd);
  } else {
    return select(ints(0xff), even, left<8>(odd));
  }
}

// `ahead`: what is read while this is written; kToL2: and not soon.
template <Kind kKind, bool kDivide, bool kStream, bool kToL2, typename T>
static void write_codes(uint8_t* codes, const T* x, int64_t count, const Divisor& by, const T* ahead) {
  const auto put = [&](uint8_t* to, Pair pair) {
    const I made = codes_of<kKind, kDivide>(even_odd<T>(pair), by);
    if constexpr (kKind == kToInt4) {
      put_quarters(to, made);
    } else {
      put_halves<kStream>(to, made);
    }
  };
  constexpr int64_t kInByte = kKind == kToInt4 ? 2 : 1;
  int64_t i = 0;
  for (; i + kCodes <= count; i += kCodes) {
    prefetch<kToL2>(ahead + i);
    put(codes + i / kInByte, load(x + i));
  }
  if (i < count) {
    alignas(64) uint8_t rest[kCodes];
    put(rest, load_tail(x + i, count - i));
    if (kKind == kToInt4 && count % 2) rest[(count - i) / 2] &= 15;  // no code past the end
    memcpy(codes + i / kInByte, rest, (count - i + kInByte - 1) / kInByte);
  }
}

// Codes of a run of activations that shares one scale; zeros where that is NaN.
template <Kind kKind, bool kToL2, typename T>
static void write_run(uint8_t* codes, const T* x, int64_t count, float scale, const Divisor& by, const T* ahead,
                      bool stream) {
  if (scale != scale) {
    memset(codes, 0, count);
  } else if (kFused && scale < kLeastScale) {
    write_codes<kKind, true, false, kToL2>(codes, x, count, by, ahead);
  } else if (kStreams && stream && reinterpret_cast<uintptr_t>(codes) % kCodes == 0) {
    write_codes<kKind, false, true, kToL2>(codes, x, count, by, ahead);
  } else {
    write_codes<kKind, false, false, kToL2>(codes, x, count, by, ahead);
  }
}

// The scale of a run of activations whose largest magnitude has these bits; NaN if that is not finite.
template <Kind kKind>
static float scale_of(uint32_t largest) {
  if (largest >= kInfinite) return __builtin_nanf("");
  const float scale = as_float(largest) / (kKind == kToE4m3 ? kLargestE4m3 : 127.0f);
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
