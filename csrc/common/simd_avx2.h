// AVX2, FMA and F16C: 8 lanes. Included by simd.h only.
#pragma once

namespace m4ov {
namespace M4OV_VARIANT {

constexpr int kLanes = 8;

struct V {
  __m256 v;
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

M4OV_INLINE V set1(float x) { return {_mm256_set1_ps(x)}; }
M4OV_INLINE V operator+(V x, V y) { return {_mm256_add_ps(x.v, y.v)}; }
M4OV_INLINE V operator-(V x, V y) { return {_mm256_sub_ps(x.v, y.v)}; }
M4OV_INLINE V operator*(V x, V y) { return {_mm256_mul_ps(x.v, y.v)}; }
M4OV_INLINE V operator/(V x, V y) { return {_mm256_div_ps(x.v, y.v)}; }
M4OV_INLINE V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.v, y.v, z.v)}; }
M4OV_INLINE V min(V x, V y) { return {_mm256_min_ps(x.v, y.v)}; }
M4OV_INLINE V max(V x, V y) { return {_mm256_max_ps(x.v, y.v)}; }
M4OV_INLINE V magnitude(V x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
// x, no further from zero than `most`; of NaN, `most` or NaN.
M4OV_INLINE V limited(V x, V most) { return max(set1(0.0f) - most, min(most, x)); }
M4OV_INLINE V limited_magnitude(V x, V most) { return min(most, magnitude(x)); }
// `yes` where the sign bit of x is set, else `no`.
M4OV_INLINE V where_negative(V x, V yes, V no) { return {_mm256_blendv_ps(no.v, yes.v, x.v)}; }
M4OV_INLINE V nearest(V x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x · 2^n for whole n in [-151, 129]. In two steps, because 2^n alone need not be a normal number.
M4OV_INLINE V scale_by_power(V x, V n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}
M4OV_INLINE Split split(V x) {
  const V whole = {_mm256_floor_ps(x.v)};
  return {x - whole, whole};
}
// Into the range of scale_by_power. min and max hand on their second operand when that is NaN.
M4OV_INLINE V clamp_exponent(V x) { return min(set1(129.0f), max(set1(-151.0f), x)); }
// rcpps has 12 bits, too few for fp16.
M4OV_INLINE V reciprocal_fast(V x) { return set1(1.0f) / x; }
// See simd.h.
M4OV_INLINE Power exp2_of_bits(V x) {
  const __m256 one = _mm256_set1_ps(1.0f), exponent = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
  const __m256 number = _mm256_castsi256_ps(_mm256_cvtps_epi32(x.v));
  const V mantissa = {_mm256_or_ps(_mm256_andnot_ps(exponent, number), one)};
  V p = set1(0.00951841781f);  // minimax for 2^(t - 1.5 - 1/128) on [1, 2]
  p = fma(p, mantissa, set1(-0.00149463541f));
  p = fma(p, mantissa, set1(0.117177192f));
  p = fma(p, mantissa, set1(0.219437129f));
  p = fma(p, mantissa, set1(0.358651717f));
  return {p, {_mm256_and_ps(number, exponent)}};
}

M4OV_INLINE float lane_sum(V x) {
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
M4OV_INLINE float lane_max(V x) {
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

M4OV_INLINE V load_vector(const float* p) { return {_mm256_loadu_ps(p)}; }
M4OV_INLINE void store_vector(float* p, V x) { _mm256_storeu_ps(p, x.v); }
M4OV_INLINE void stream_vector(float* p, V x) { _mm256_stream_ps(p, x.v); }
M4OV_INLINE Pair load(const float* p) { return {{_mm256_loadu_ps(p)}, {_mm256_loadu_ps(p + 8)}}; }
M4OV_INLINE void store(float* p, Pair x) {
  _mm256_storeu_ps(p, x.a.v);
  _mm256_storeu_ps(p + 8, x.b.v);
}
M4OV_INLINE void stream(float* p, Pair x) {
  _mm256_stream_ps(p, x.a.v);
  _mm256_stream_ps(p + 8, x.b.v);
}

M4OV_INLINE __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
M4OV_INLINE void store_bits(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
M4OV_INLINE void stream_bits(void* p, __m256i x) { _mm256_stream_si256(static_cast<__m256i*>(p), x); }
M4OV_INLINE __m256i upper_half() { return _mm256_set1_epi32(static_cast<int>(0xffff0000)); }

// bf16: even elements in a, odd ones in b.
M4OV_INLINE Pair load(const Bf16* p) {
  const __m256i x = load_bits(p);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))}, {_mm256_castsi256_ps(_mm256_and_si256(x, upper_half()))}};
}
// The value rounded (nearest even) in the upper 16 bits, rubbish in the lower; see `canonical` in simd.h for NaN.
M4OV_INLINE __m256i bf16_bits(V x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
M4OV_INLINE __m256i pack_bf16(Pair x) {
  return _mm256_blend_epi16(_mm256_srli_epi32(bf16_bits(x.a), 16), bf16_bits(x.b), 0xaa);
}
M4OV_INLINE void store(Bf16* p, Pair x) { store_bits(p, pack_bf16(x)); }
M4OV_INLINE void stream(Bf16* p, Pair x) { stream_bits(p, pack_bf16(x)); }

// The elements at even places, and those at odd ones.
M4OV_INLINE Pair deinterleave(Pair x) {
  const __m256 low = _mm256_permute2f128_ps(x.a.v, x.b.v, 0x20), high = _mm256_permute2f128_ps(x.a.v, x.b.v, 0x31);
  const __m256 even = _mm256_shuffle_ps(low, high, 0x88), odd = _mm256_shuffle_ps(low, high, 0xdd);
  return {{even}, {odd}};
}

M4OV_INLINE Pair load(const Fp16* p) {
  const __m256i x = load_bits(p);
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(x))}, {_mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))}};
}
M4OV_INLINE __m256i pack_fp16(Pair x) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(x.a.v, _MM_FROUND_TO_NEAREST_INT)),
                                 _mm256_cvtps_ph(x.b.v, _MM_FROUND_TO_NEAREST_INT), 1);
}
M4OV_INLINE void store(Fp16* p, Pair x) { store_bits(p, pack_fp16(x)); }
M4OV_INLINE void stream(Fp16* p, Pair x) { stream_bits(p, pack_fp16(x)); }

M4OV_INLINE V round_to_bf16(V x) { return {_mm256_castsi256_ps(_mm256_and_si256(bf16_bits(x), upper_half()))}; }
M4OV_INLINE V round_to_fp16(V x) { return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT))}; }

}  // namespace M4OV_VARIANT
}  // namespace m4ov
