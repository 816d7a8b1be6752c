// AVX-512 (F, BW, DQ, VL): 16 lanes. Included by simd.h only.
#pragma once

namespace m4ov {
namespace M4OV_VARIANT {

constexpr int kLanes = 16;

struct V {
  __m512 v;
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

M4OV_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
M4OV_INLINE V operator+(V x, V y) { return {_mm512_add_ps(x.v, y.v)}; }
M4OV_INLINE V operator-(V x, V y) { return {_mm512_sub_ps(x.v, y.v)}; }
M4OV_INLINE V operator*(V x, V y) { return {_mm512_mul_ps(x.v, y.v)}; }
M4OV_INLINE V operator/(V x, V y) { return {_mm512_div_ps(x.v, y.v)}; }
M4OV_INLINE V fma(V x, V y, V z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
M4OV_INLINE V min(V x, V y) { return {_mm512_min_ps(x.v, y.v)}; }
M4OV_INLINE V max(V x, V y) { return {_mm512_max_ps(x.v, y.v)}; }
M4OV_INLINE V magnitude(V x) { return {_mm512_abs_ps(x.v)}; }
// x, no further from zero than `most`; of NaN, `most` or NaN.
M4OV_INLINE V limited(V x, V most) { return {_mm512_range_ps(x.v, most.v, 0b0010)}; }
M4OV_INLINE V limited_magnitude(V x, V most) { return {_mm512_range_ps(x.v, most.v, 0b1010)}; }
// `yes` where the sign bit of x is set, else `no`.
M4OV_INLINE V where_negative(V x, V yes, V no) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), no.v, yes.v)};
}
M4OV_INLINE V nearest(V x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
M4OV_INLINE V scale_by_power(V x, V n) { return {_mm512_scalef_ps(x.v, n.v)}; }  // x · 2^floor(n)
// x without its whole part, in [0, 1), and something whose floor that is.
M4OV_INLINE Split split(V x) {
  return {{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}, x};
}
// Into the range of scale_by_power. max hands on its second operand when that is NaN; inf is split into NaN.
M4OV_INLINE V clamp_exponent(V x) { return max(set1(-151.0f), x); }
M4OV_INLINE V reciprocal_fast(V x) { return {_mm512_rcp14_ps(x.v)}; }
// See simd.h. The upper five bits of the mantissa choose a root of two from a table, and what is left needs one FMA.
M4OV_INLINE Power exp2_of_bits(V x) {
  const __m512i bits = _mm512_cvtps_epi32(x.v);
  const __m512i low = _mm512_setr_epi32(0x000000, 0x02cd87, 0x05aac3, 0x08980f, 0x0b95c2, 0x0ea43a, 0x11c3d3, 0x14f4f0,
                                        0x1837f0, 0x1b8d3a, 0x1ef532, 0x227043, 0x25fed7, 0x29a15b, 0x2d583f, 0x3123f6);
  const __m512i high = _mm512_setr_epi32(0x3504f3, 0x38fbaf, 0x3d08a4, 0x412c4d, 0x45672a, 0x49b9be, 0x4e248c, 0x52a81e,
                                         0x5744fd, 0x5bfbb8, 0x60ccdf, 0x65b907, 0x6ac0c7, 0x6fe4ba, 0x75257d, 0x7a83b3);
  const __m512i root = _mm512_permutex2var_epi32(low, _mm512_srli_epi32(bits, 18), high);  // 2^(k/32), its mantissa
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  const __m512i power = _mm512_ternarylogic_epi32(bits, exponent, root, 0xea);  // bits & exponent | root
  const __m512i rest = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0x3ffff), _mm512_set1_epi32(0x3f800000), 0xea);
  // Minimax for 2^(t - 1.5 - 1/128) on [1, 1 + 1/32].
  return {fma({_mm512_castsi512_ps(rest)}, set1(0.492785607f), set1(0.210481767f)), {_mm512_castsi512_ps(power)}};
}

M4OV_INLINE __m256 halves_sum(V x) { return _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1)); }
M4OV_INLINE float lane_sum(V x) {
  const __m256 y = halves_sum(x);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
M4OV_INLINE float lane_max(V x) {
  const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

M4OV_INLINE V load_vector(const float* p) { return {_mm512_loadu_ps(p)}; }
M4OV_INLINE void store_vector(float* p, V x) { _mm512_storeu_ps(p, x.v); }
M4OV_INLINE void stream_vector(float* p, V x) { _mm512_stream_ps(p, x.v); }
M4OV_INLINE Pair load(const float* p) { return {{_mm512_loadu_ps(p)}, {_mm512_loadu_ps(p + 16)}}; }
M4OV_INLINE void store(float* p, Pair x) {
  _mm512_storeu_ps(p, x.a.v);
  _mm512_storeu_ps(p + 16, x.b.v);
}
M4OV_INLINE void stream(float* p, Pair x) {
  _mm512_stream_ps(p, x.a.v);
  _mm512_stream_ps(p + 16, x.b.v);
}

// bf16: even elements in a, odd ones in b.
M4OV_INLINE Pair unpack_bf16(__m512i x) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
}
M4OV_INLINE Pair load(const Bf16* p) { return unpack_bf16(_mm512_loadu_si512(p)); }
// The value rounded (nearest even) in the upper 16 bits, rubbish in the lower; see `canonical` in simd.h for NaN.
M4OV_INLINE __m512i bf16_bits(V x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
M4OV_INLINE __m512i pack_bf16_exact(Pair x) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bf16_bits(x.a), 16), bf16_bits(x.b));
}
#ifdef __AVX512BF16__
// A pair whose operands were in the order that `kTurns` calls of round_turned leave, rounded by the instruction and put in
// the order of memory.
template <int kTurns>
M4OV_INLINE __m512i converted(Pair x) {
  constexpr int kBy = 4 - kTurns;
  alignas(64) short order[32];
  for (int e = 0; e < 32; ++e) order[e] = static_cast<short>((e << kBy | e >> (5 - kBy)) & 31);
  const __m512bh halves = _mm512_cvtne2ps_pbh(x.b.v, x.a.v);
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), reinterpret_cast<const __m512i&>(halves));
}
M4OV_INLINE bool any_zero(__m512i bf16) { return _mm512_testn_epi16_mask(bf16, _mm512_set1_epi16(0x7fff)) != 0; }
// The instruction makes zeros of denormal numbers: what has any is done again.
M4OV_INLINE __m512i pack_bf16(Pair x) {
  const __m512i bits = converted<0>(x);
  return __builtin_expect(any_zero(bits), 0) ? pack_bf16_exact(x) : bits;
}
// For whom the caller knows that nothing is denormal but what is zero.
constexpr bool kConverts = true;
// Rounded, in another order: no permutation puts the halves back, and what has rounded several times, with all operands in
// the order of the day, does so once, when it stores. (An element's number has five bits; its place in a pair is that number
// rotated by one bit, and by one more with each rounding.)
M4OV_INLINE Pair round_turned(Pair x) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(x.b.v, x.a.v);
  return unpack_bf16(reinterpret_cast<const __m512i&>(halves));
}
template <bool kStream, int kTurns>
M4OV_INLINE void put_turned(Bf16* p, Pair x) {
  const __m512i bits = converted<kTurns>(x);
  kStream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits) : _mm512_storeu_si512(p, bits);
}
// The smallest magnitude but zero of what was added.
struct Smallest {
  __m512i bits = _mm512_set1_epi16(-1);  // of twice the magnitude, less one: zeros come last
  void add(__m512i x) {
    bits = _mm512_min_epu16(bits, _mm512_add_epi16(_mm512_add_epi16(x, x), _mm512_set1_epi16(-1)));
  }
  void add(const Bf16* p) { add(_mm512_loadu_si512(p)); }
  void add(Pair x) { add(pack_bf16(x)); }
  float value() const {  // -0 if there was none
    const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
    const __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const uint32_t least = _mm_cvtsi128_si32(_mm_minpos_epu16(eight)) & 0xffff, found = (least + 1) / 2 << 16;
    float result;
    memcpy(&result, &found, sizeof result);
    return result;
  }
};
#else
M4OV_INLINE __m512i pack_bf16(Pair x) { return pack_bf16_exact(x); }
#endif
M4OV_INLINE void store(Bf16* p, Pair x) { _mm512_storeu_si512(p, pack_bf16(x)); }
M4OV_INLINE void stream(Bf16* p, Pair x) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack_bf16(x)); }

// The elements at even places, and those at odd ones.
M4OV_INLINE Pair deinterleave(Pair x) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(x.a.v, even, x.b.v)}, {_mm512_permutex2var_ps(x.a.v, odd, x.b.v)}};
}

M4OV_INLINE Pair load(const Fp16* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return {{_mm512_cvtph_ps(_mm512_castsi512_si256(x))}, {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1))}};
}
constexpr int kHalfRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
M4OV_INLINE __m512i pack_fp16(Pair x) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(x.a.v, kHalfRounding)),
                            _mm512_cvtps_ph(x.b.v, kHalfRounding), 1);
}
M4OV_INLINE void store(Fp16* p, Pair x) { _mm512_storeu_si512(p, pack_fp16(x)); }
M4OV_INLINE void stream(Fp16* p, Pair x) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack_fp16(x)); }

M4OV_INLINE V round_to_bf16(V x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(bf16_bits(x), _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}
M4OV_INLINE V round_to_fp16(V x) { return {_mm512_cvtph_ps(_mm512_cvtps_ph(x.v, kHalfRounding))}; }

}  // namespace M4OV_VARIANT
}  // namespace m4ov
