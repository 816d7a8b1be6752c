// The activation functions and their slopes, and how elementwise work is divided.
#pragma once

#include "../common/parallel.h"
#include "../common/simd.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {

enum Function { kSilu, kGeluTanh, kGeluErf };

constexpr int64_t kSegment = 4096;  // elements per unit of work when all rows form one dense run

// The hardware's prefetchers stop at page ends; this keeps reads going across them.
template <typename T>
constexpr int64_t kAhead = 2048 / sizeof(T);

// body(offset of a dense run in the outputs, its row, its column, its length) over this call's work, in parallel.
template <typename Body>
static void for_runs(int64_t rows, int64_t columns, bool dense, int64_t bytes, int threads, const Body& body) {
  if (dense) {
    const int64_t count = rows * columns;
    parallel_ranges((count + kSegment - 1) / kSegment, bytes, threads, [&](int64_t begin, int64_t end) {
      const int64_t last = end * kSegment < count ? end * kSegment : count;
      body(begin * kSegment, int64_t{0}, begin * kSegment, last - begin * kSegment);
    });
  } else {
    parallel_ranges(rows, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row * columns, row, int64_t{0}, columns);
    });
  }
}

struct Activated {
  V value, slope;
};

// Where results are rounded to 16 bits, an exponential is a product of two factors (exp2_of_bits): its argument comes out
// of a multiplication that is there anyway, and an FMA adds the product to one.

// ---- silu(x) = x · sigmoid(x)

constexpr float kLog2e = 1.44269504f, kHuge = 3.40282347e38f;

template <typename T>
M4OV_INLINE V sigmoid(V x) {
  const V one = set1(1.0f);
  if constexpr (kSame<T, float>) {
    return one / (one + exp_full(set1(0.0f) - x));
  } else {
    const V near = limited(x, set1(kExponent / kLog2e));
    const Power e = exp2_of_bits(fma(near, set1(-kLog2e * kBits), set1(kBitsOne)));
    return reciprocal_fast(fma(e.factor, e.power, one));
  }
}

template <typename T>
M4OV_INLINE Activated silu(V x) {
  const V one = set1(1.0f), s = sigmoid<T>(x);
  return {x * s, s * fma(x, one - s, one)};
}

// ---- gelu(x), tanh approximation: x/2 · (1 + tanh u) = x · sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)

constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;  // of 2u

// exp(-2u), which may be infinite. For results in 16 bits: of |x| up to kTanhEnd, where 2u is kExponent · ln 2.
M4OV_INLINE V exp_minus_2u(V x, V square) { return exp_full(x * fma(square, set1(-kCubic), set1(-kLinear))); }
constexpr float kTanhEnd = 10.0461650f;
M4OV_INLINE Power coarse_exp_minus_2u(V x, V square) {
  constexpr float kScale = -kLog2e * kBits;
  return exp2_of_bits(fma(x, fma(square, set1(kCubic * kScale), set1(kLinear * kScale)), set1(kBitsOne)));
}

template <typename T>
M4OV_INLINE V gelu_tanh(V x) {
  const V one = set1(1.0f);
  if constexpr (kSame<T, float>) {
    return x / (one + exp_minus_2u(x, x * x));
  } else {
    const V near = limited(x, set1(kTanhEnd));
    const Power e = coarse_exp_minus_2u(near, near * near);
    return x * reciprocal_fast(fma(e.factor, e.power, one));
  }
}

template <typename T>
M4OV_INLINE Activated gelu_tanh_slope(V x) {
  V e, square;
  if constexpr (kSame<T, float>) {
    square = min(set1(1e30f), x * x);  // infinite, it would meet a sigmoid of 0
    e = exp_minus_2u(x, square);
  } else {
    const V near = limited(x, set1(kTanhEnd));
    square = near * near;
    const Power parts = coarse_exp_minus_2u(near, square);
    e = parts.factor * parts.power;
  }
  const V s = reciprocal_for<T>(set1(1.0f) + e);
  const V rest = min(set1(kHuge), e) * s;  // 1 - sigmoid, without cancellation; 0 where the sigmoid is
  const V derivative = fma(square, set1(3 * kCubic), set1(kLinear));  // of 2u
  return {x * s, fma(x * (s * rest), derivative, s)};
}

// ---- gelu(x), exact: x · Phi(x), Phi the normal distribution

struct Normal {
  V below, density;  // Phi(x), and the derivative of Phi
};

// Phi(-a) = exp(-a²/2) · t · p(t) with t = 1 / (1 + c·a), p minimax in relative error for a in [0, 14.5]: 3.2e-8 for
// results in fp32, 5.8e-5 for those that are rounded to 16 bits. Phi(-a) is 0 beyond, and for the latter from 13.3 on.
template <typename T>
M4OV_INLINE Normal normal(V x) {
  const V one = set1(1.0f);
  V exponential, t, p;
  if constexpr (kSame<T, float>) {
    const V a = min(set1(14.5f), magnitude(x)), square = a * a;
    const V rest = fma(a, a, set1(0.0f) - square);  // what rounding the square has lost (nothing without FMA)
    exponential = exp_full(square * set1(-0.5f));
    exponential = fma(exponential, rest * set1(-0.5f), exponential);
    t = one / fma(a, set1(0.35f), one);
    p = set1(-0.0291578347826f);
    p = fma(p, t, set1(0.144030705365f));
    p = fma(p, t, set1(-0.255838628471f));
    p = fma(p, t, set1(0.159319338275f));
    p = fma(p, t, set1(-0.0232121526543f));
    p = fma(p, t, set1(0.105552434163f));
    p = fma(p, t, set1(0.119821301207f));
    p = fma(p, t, set1(0.139863514011f));
    p = fma(p, t, set1(0.139621306903f));
  } else {
    const V a = limited_magnitude(x, set1(13.2944237f));  // sqrt(2 ln 2 · kExponent), where the power of two is 0
    const Power e = exp2_of_bits(fma(a * a, set1(-0.5f * kLog2e * kBits), set1(kBitsOne)));
    exponential = e.factor * e.power;
    t = reciprocal_fast(fma(a, set1(0.25f), one));
    p = set1(0.240084115297f);
    p = fma(p, t, set1(-0.100221143497f));
    p = fma(p, t, set1(0.177268051205f));
    p = fma(p, t, set1(0.0816298509572f));
    p = fma(p, t, set1(0.10121079916f));
  }
  const V tail = exponential * (t * p);
  return {where_negative(x, tail, one - tail), exponential * set1(0.398942280f)};
}

// ---- By name, on pairs

template <typename T, Function kFunction>
M4OV_INLINE V activate(V x) {
  if constexpr (kFunction == kSilu) {
    return silu<T>(x).value;
  } else if constexpr (kFunction == kGeluTanh) {
    return gelu_tanh<T>(x);
  } else {
    return x * normal<T>(x).below;
  }
}

template <typename T, Function kFunction>
M4OV_INLINE Activated differentiate(V x) {
  if constexpr (kFunction == kSilu) {
    return silu<T>(x);
  } else if constexpr (kFunction == kGeluTanh) {
    return gelu_tanh_slope<T>(x);
  } else {
    const Normal at = normal<T>(x);
    return {x * at.below, fma(x, at.density, at.below)};
  }
}

struct ActivatedPair {
  Pair value, slope;
};

template <typename T, Function kFunction>
M4OV_INLINE Pair activate(Pair x) {
  return {activate<T, kFunction>(x.a), activate<T, kFunction>(x.b)};
}

template <typename T, Function kFunction>
M4OV_INLINE ActivatedPair differentiate(Pair x) {
  const Activated a = differentiate<T, kFunction>(x.a), b = differentiate<T, kFunction>(x.b);
  return {{a.value, b.value}, {a.slope, b.slope}};
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
