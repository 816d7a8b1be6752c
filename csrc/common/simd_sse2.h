// SSE2, what every x86-64 has: 4 lanes. Included by simd.h only.
#pragma once

namespace m4ov {
namespace M4OV_VARIANT {

constexpr int kLanes = 4;

struct V {
  __m128 v;
};
struct Pair {
  V a, b;
};
struct Split {
  V fraction, whole;
};
struct Power {
  V factor, power;
};

M4OV_INLINE V set1(float x) { return {_mm_set1_ps(x)}; }
M4OV_INLINE V operator+(V x, V y) { return {_mm_add_ps(x.v, y.v)}; }
M4OV_INLINE V operator-(V x, V y) { return {_mm_sub_ps(x.v, y.v)}; }
M4OV_INLINE V operator*(V x, V y) { return {_mm_mul_ps(x.v, y.v)}; }
M4OV_INLINE V operator/(V x, V y) { return {_mm_div_ps(x.v, y.v)}; }
M4OV_INLINE V fma(V x, V y, V z) { return {_mm_add_ps(_mm_mul_ps(x.v, y.v), z.v)}; }  // rounds twice
M4OV_INLINE V min(V x, V y) { return {_mm_min_ps(x.v, y.v)}; }
M4OV_INLINE V max(V x, V y) { return {_mm_max_ps(x.v, y.v)}; }
M4OV_INLINE V magnitude(V x) { return {_mm_andnot_ps(_mm_set1_ps(-0.0f), x.v)}; }
// x, no further from zero than `most`; of NaN, `most` or NaN.
M4OV_INLINE V limited(V x, V most) { return max(set1(0.0f) - most, min(most, x)); }
M4OV_INLINE V limited_magnitude(V x, V most) { return min(most, magnitude(x)); }
// `yes` where the sign bit of x is set, else `no`.
M4OV_INLINE V where_negative(V x, V yes, V no) {
  const __m128 mask = _mm_castsi128_ps(_mm_srai_epi32(_mm_castps_si128(x.v), 31));
  return {_mm_or_ps(_mm_and_ps(mask, yes.v), _mm_andnot_ps(mask, no.v))};
}
M4OV_INLINE V nearest(V x) { return {_mm_cvtepi32_ps(_mm_cvtps_epi32(x.v))}; }  // |x| < 2^31
// x · 2^n for whole n in [-151, 129]. In two steps, because 2^n alone need not be a normal number.
M4OV_INLINE V scale_by_power(V x, V n) {
  const __m128i whole = _mm_cvtps_epi32(n.v), half = _mm_srai_epi32(whole, 1), bias = _mm_set1_epi32(127);
  const __m128i first = _mm_slli_epi32(_mm_add_epi32(half, bias), 23);
  const __m128i second = _mm_slli_epi32(_mm_add_epi32(_mm_sub_epi32(whole, half), bias), 23);
  return {_mm_mul_ps(_mm_mul_ps(x.v, _mm_castsi128_ps(first)), _mm_castsi128_ps(second))};
}
M4OV_INLINE Split split(V x) {
  const V whole = nearest(x - set1(0.5f));  // at ties one below the floor: the fraction is then 1
  return {x - whole, whole};
}
// Into the range of scale_by_power. min and max hand on their second operand when that is NaN.
M4OV_INLINE V clamp_exponent(V x) { return min(set1(129.0f), max(set1(-151.0f), x)); }
M4OV_INLINE V reciprocal_fast(V x) { return set1(1.0f) / x; }
// See simd.h.
M4OV_INLINE Power exp2_of_bits(V x) {
  const __m128 number = _mm_castsi128_ps(_mm_cvtps_epi32(x.v));
  const __m128 one = _mm_set1_ps(1.0f), exponent = _mm_castsi128_ps(_mm_set1_epi32(0x7f800000));
  const V mantissa = {_mm_or_ps(_mm_andnot_ps(exponent, number), one)};
  V p = set1(0.00951841781f);  // minimax for 2^(t - 1.5 - 1/128) on [1, 2]
  p = fma(p, mantissa, set1(-0.00149463541f));
  p = fma(p, mantissa, set1(0.117177192f));
  p = fma(p, mantissa, set1(0.219437129f));
  p = fma(p, mantissa, set1(0.358651717f));
  return {p, {_mm_and_ps(number, exponent)}};
}

M4OV_INLINE float lane_sum(V x) {
  const __m128 z = _mm_add_ps(x.v, _mm_movehl_ps(x.v, x.v));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
}
M4OV_INLINE float lane_max(V x) {
  const __m128 z = _mm_max_ps(x.v, _mm_movehl_ps(x.v, x.v));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_shuffle_ps(z, z, 1)));
}

M4OV_INLINE V load_vector(const float* p) { return {_mm_loadu_ps(p)}; }
M4OV_INLINE void store_vector(float* p, V x) { _mm_storeu_ps(p, x.v); }
M4OV_INLINE void stream_vector(float* p, V x) { _mm_stream_ps(p, x.v); }
M4OV_INLINE Pair load(const float* p) { return {{_mm_loadu_ps(p)}, {_mm_loadu_ps(p + 4)}}; }
M4OV_INLINE void store(float* p, Pair x) {
  _mm_storeu_ps(p, x.a.v);
  _mm_storeu_ps(p + 4, x.b.v);
}
M4OV_INLINE void stream(float* p, Pair x) {
  _mm_stream_ps(p, x.a.v);
  _mm_stream_ps(p + 4, x.b.v);
}

M4OV_INLINE __m128i load_bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
M4OV_INLINE void store_bits(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
M4OV_INLINE void stream_bits(void* p, __m128i x) { _mm_stream_si128(static_cast<__m128i*>(p), x); }
M4OV_INLINE __m128i select(__m128i mask, __m128i yes, __m128i no) {
  return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}
M4OV_INLINE __m128i upper_half() { return _mm_set1_epi32(static_cast<int>(0xffff0000)); }

// bf16: even elements in a, odd ones in b.
M4OV_INLINE Pair load(const Bf16* p) {
  const __m128i x = load_bits(p);
  return {{_mm_castsi128_ps(_mm_slli_epi32(x, 16))}, {_mm_castsi128_ps(_mm_and_si128(x, upper_half()))}};
}
// The value rounded (nearest even) in the upper 16 bits, zeros in the lower; see `canonical` in simd.h for NaN.
M4OV_INLINE __m128i bf16_bits(V x) {
  const __m128i bits = _mm_castps_si128(x.v);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd);
  return _mm_and_si128(rounded, upper_half());
}
M4OV_INLINE __m128i pack_bf16(Pair x) { return _mm_or_si128(_mm_srli_epi32(bf16_bits(x.a), 16), bf16_bits(x.b)); }
M4OV_INLINE void store(Bf16* p, Pair x) { store_bits(p, pack_bf16(x)); }
M4OV_INLINE void stream(Bf16* p, Pair x) { stream_bits(p, pack_bf16(x)); }

// The elements at even places, and those at odd ones.
M4OV_INLINE Pair deinterleave(Pair x) {
  return {{_mm_shuffle_ps(x.a.v, x.b.v, 0x88)}, {_mm_shuffle_ps(x.a.v, x.b.v, 0xdd)}};
}

// fp16 in integer arithmetic, as there is no F16C. Works with denormals flushed (DAZ, FTZ) too.
M4OV_INLINE V widen_fp16(__m128i half) {  // four values, each in the low 16 bits of its lane
  const __m128i magnitude = _mm_slli_epi32(_mm_and_si128(half, _mm_set1_epi32(0x7fff)), 13);
  const __m128i exponent = _mm_and_si128(magnitude, _mm_set1_epi32(0x1f << 23));
  const __m128i rebias = _mm_set1_epi32((127 - 15) << 23);
  const __m128i normal = _mm_add_epi32(magnitude, rebias);
  const __m128i special = _mm_add_epi32(normal, _mm_set1_epi32((128 - 16) << 23));  // inf and NaN
  // Subnormal: read the mantissa as 2^-14 · 1.m, then take the 2^-14 off again.
  const __m128i one_exponent = _mm_set1_epi32((127 - 14) << 23);
  const __m128 subnormal =
      _mm_sub_ps(_mm_castsi128_ps(_mm_or_si128(magnitude, one_exponent)), _mm_castsi128_ps(one_exponent));
  __m128i bits = select(_mm_cmpeq_epi32(exponent, _mm_set1_epi32(0x1f << 23)), special, normal);
  bits = select(_mm_cmpeq_epi32(exponent, _mm_setzero_si128()), _mm_castps_si128(subnormal), bits);
  const __m128i sign = _mm_slli_epi32(_mm_and_si128(half, _mm_set1_epi32(0x8000)), 16);
  return {_mm_castsi128_ps(_mm_or_si128(bits, sign))};
}
M4OV_INLINE __m128i fp16_bits(V x) {  // four values, each in the low 16 bits of its lane; nearest even
  const __m128i bits = _mm_castps_si128(x.v);
  const __m128i sign = _mm_and_si128(bits, _mm_set1_epi32(static_cast<int>(0x80000000)));
  const __m128i magnitude = _mm_xor_si128(bits, sign);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(magnitude, 13), _mm_set1_epi32(1));
  __m128i rounded = _mm_add_epi32(magnitude, _mm_set1_epi32((15 - 127) * (1 << 23) + 0xfff));
  rounded = _mm_srli_epi32(_mm_add_epi32(rounded, odd), 13);
  // Below 2^-14: adding 1/2 lets the FPU round at fp16's last subnormal place.
  const __m128 half = _mm_set1_ps(0.5f);
  const __m128i subnormal =
      _mm_sub_epi32(_mm_castps_si128(_mm_add_ps(_mm_castsi128_ps(magnitude), half)), _mm_castps_si128(half));
  const __m128i is_nan = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0xff << 23));
  const __m128i infinite = select(is_nan, _mm_set1_epi32(0x7e00), _mm_set1_epi32(0x7c00));
  __m128i result = select(_mm_cmpgt_epi32(_mm_set1_epi32((127 - 14) << 23), magnitude), subnormal, rounded);
  result = select(_mm_cmpgt_epi32(magnitude, _mm_set1_epi32(((127 + 16) << 23) - 1)), infinite, result);
  return _mm_or_si128(result, _mm_srli_epi32(sign, 16));
}
M4OV_INLINE Pair load(const Fp16* p) {
  const __m128i x = load_bits(p), zero = _mm_setzero_si128();
  return {widen_fp16(_mm_unpacklo_epi16(x, zero)), widen_fp16(_mm_unpackhi_epi16(x, zero))};
}
M4OV_INLINE __m128i pack_fp16(Pair x) {
  // The pack saturates signed numbers: sign-extend the 16 bits first.
  const __m128i a = _mm_srai_epi32(_mm_slli_epi32(fp16_bits(x.a), 16), 16);
  const __m128i b = _mm_srai_epi32(_mm_slli_epi32(fp16_bits(x.b), 16), 16);
  return _mm_packs_epi32(a, b);
}
M4OV_INLINE void store(Fp16* p, Pair x) { store_bits(p, pack_fp16(x)); }
M4OV_INLINE void stream(Fp16* p, Pair x) { stream_bits(p, pack_fp16(x)); }

M4OV_INLINE V round_to_bf16(V x) { return {_mm_castsi128_ps(bf16_bits(x))}; }
M4OV_INLINE V round_to_fp16(V x) { return widen_fp16(fp16_bits(x)); }

}  // namespace M4OV_VARIANT
}  // namespace m4ov
