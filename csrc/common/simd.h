// Vectors of fp32 lanes, and pairs of them loaded from and stored to fp32, bf16 and fp16 memory.
//
// A kernel source is compiled once per instruction set with -DM4OV_VARIANT=<name>, which is also the namespace of all
// it defines. Functions here are static: the linker must never pick one variant's copy for another.
//
// A Pair holds 2·kLanes neighbouring elements in an order of its own (bf16 splits them into even and odd, which needs
// no shuffles), the same for every load, store and reduction of one dtype.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifndef M4OV_VARIANT
#error "compile with -DM4OV_VARIANT=<instruction set>"
#endif
#define M4OV_INLINE static inline __attribute__((always_inline))

namespace m4ov {
namespace M4OV_VARIANT {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

}  // namespace M4OV_VARIANT
}  // namespace m4ov

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_sse2.h"
#endif

namespace m4ov {
namespace M4OV_VARIANT {

constexpr int kGroup = 2 * kLanes;  // elements in a Pair
constexpr int kVectorBytes = 4 * kLanes;

M4OV_INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
M4OV_INLINE Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
M4OV_INLINE Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
M4OV_INLINE Pair both(V x) { return {x, x}; }
M4OV_INLINE Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// The nearest (ties to even) value that T can hold.
template <typename T>
M4OV_INLINE V round_to(V x) {
  if constexpr (kSame<T, Bf16>) {
    return round_to_bf16(x);
  } else if constexpr (kSame<T, Fp16>) {
    return round_to_fp16(x);
  } else {
    return x;
  }
}
template <typename T>
M4OV_INLINE Pair round_to(Pair x) {
  return {round_to<T>(x.a), round_to<T>(x.b)};
}

// The order that `kTurns` calls of round_turned leave.
template <int kTurns>
M4OV_INLINE Pair reordered(Pair x) {
  if constexpr (kTurns == 0) {
    return x;
  } else {
    return reordered<kTurns - 1>(deinterleave(x));
  }
}

// As many float32 in memory as a pair has, in the order of T's pairs.
template <typename T>
M4OV_INLINE Pair paired(const float* p) {
  return kSame<T, Bf16> ? deinterleave(load(p)) : load(p);
}

#ifndef __AVX512BF16__  // where simd_avx512.h has no conversion by an instruction, which makes zeros of denormal numbers
constexpr bool kConverts = false;
M4OV_INLINE Pair round_turned(Pair x) { return round_to<Bf16>(x); }
template <bool kStream, int kTurns>
M4OV_INLINE void put_turned(Bf16* p, Pair x) {
  kStream ? stream(p, x) : store(p, x);
}
struct Smallest {
  void add(const Bf16*) {}
  void add(Pair) {}
  float value() const { return 0.0f; }
};
#endif

template <typename T>
M4OV_INLINE T one() {
  if constexpr (kSame<T, Bf16>) {
    return {0x3f80};
  } else if constexpr (kSame<T, Fp16>) {
    return {0x3c00};
  } else {
    return 1.0f;
  }
}
template <typename T>
M4OV_INLINE T minus_infinity() {
  if constexpr (kSame<T, Bf16>) {
    return {0xff80};
  } else if constexpr (kSame<T, Fp16>) {
    return {0xfc00};
  } else {
    return -__builtin_inff();
  }
}

// The last `count` < kGroup elements of a row; the missing lanes read as `fill`.
template <typename T>
static Pair load_tail(const T* source, int64_t count, T fill) {
  T buffer[kGroup];
  for (int i = 0; i < kGroup; ++i) buffer[i] = fill;
  memcpy(buffer, source, count * sizeof(T));
  return load(buffer);
}
template <typename T>
M4OV_INLINE Pair load_tail(const T* source, int64_t count) {
  return load_tail(source, count, T{});
}
template <typename T>
static void store_tail(T* target, Pair x, int64_t count) {
  T buffer[kGroup];
  store(buffer, x);
  memcpy(target, buffer, count * sizeof(T));
}

// kStream: past the caches, straight to memory; needs kVectorBytes alignment and a fence() before others read.
template <bool kStream, typename T>
M4OV_INLINE void put(T* target, Pair x) {
  if constexpr (kStream) {
    stream(target, x);
  } else {
    store(target, x);
  }
}
M4OV_INLINE bool vector_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }
M4OV_INLINE void fence() { _mm_sfence(); }

// Asks for the group at `p`, which may lie outside the tensor: a prefetch never faults. kToL2: not as far as L1.
template <bool kToL2 = false, typename T>
M4OV_INLINE void prefetch(const T* p) {
  const char* line = reinterpret_cast<const char*>(p);
  for (unsigned i = 0; i < sizeof(T) * kGroup; i += 64) _mm_prefetch(line + i, kToL2 ? _MM_HINT_T1 : _MM_HINT_T0);
}

// Rounding to bf16 keeps a NaN only if the lower half of its bits is clear. So it is in NaN that comes from 16-bit
// inputs or from arithmetic on other numbers; an fp32 input that is multiplied into a 16-bit output goes through here.
M4OV_INLINE float canonical(float x) { return x == x ? x : __builtin_nanf(""); }

M4OV_INLINE float lane_sum(Pair x) { return lane_sum(x.a + x.b); }

// 2^x to 3e-6 relative, for results that are rounded to 16 bits. Of +inf: inf or NaN.
M4OV_INLINE V exp2_fast(V x) {
  const Split t = split(clamp_exponent(x));
  V p = set1(0.0135341678f);  // minimax for 2^t on [0, 1]
  p = fma(p, t.fraction, set1(0.0520114601f));
  p = fma(p, t.fraction, set1(0.241442755f));
  p = fma(p, t.fraction, set1(0.693003833f));
  p = fma(p, t.fraction, set1(1.00000262f));
  return scale_by_power(p, t.whole);
}
M4OV_INLINE V exp_fast(V x) { return exp2_fast(x * set1(1.44269504f)); }

// exp2_of_bits, for results that are rounded to 16 bits: 2^x as a product that an FMA can make, to 3e-6 relative (with
// AVX-512 3e-5), of kBits · x + kBitsOne. That is about what the bits of sqrt(2) · 2^x are as a number: so the range of x
// reaches as far to either side, and at its ends, kExponent and -kExponent, the power is inf and 0.
constexpr float kBits = 8388608.0f, kBitsOne = (127.5f + 1.0f / 128) * kBits, kExponent = 127.5f + 1.0f / 256;

// exp(x) to about one unit in the last place of fp32.
M4OV_INLINE V exp_full(V x) {
  x = min(set1(89.5f), max(set1(-104.5f), x));
  const V n = nearest(x * set1(1.44269504f));
  // ln 2 in two parts; the first has 9 bits, so that n times it is exact without FMA too.
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(0.00138367934f);  // minimax for e^r on [-ln 2 / 2, ln 2 / 2]
  p = fma(p, r, set1(0.00837485678f));
  p = fma(p, r, set1(0.0416682288f));
  p = fma(p, r, set1(0.166664198f));
  p = fma(p, r, set1(0.499999911f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

// exp and 1/x, precise enough for results that are rounded to T.
template <typename T>
M4OV_INLINE V exp_for(V x) {
  if constexpr (kSame<T, float>) {
    return exp_full(x);
  } else {
    return exp_fast(x);
  }
}
template <typename T>
M4OV_INLINE V reciprocal_for(V x) {
  if constexpr (kSame<T, float>) {
    return set1(1.0f) / x;
  } else {
    return reciprocal_fast(x);
  }
}
template <typename T>
M4OV_INLINE Pair exp_for(Pair x) {
  return {exp_for<T>(x.a), exp_for<T>(x.b)};
}
template <typename T>
M4OV_INLINE Pair reciprocal_for(Pair x) {
  return {reciprocal_for<T>(x.a), reciprocal_for<T>(x.b)};
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
