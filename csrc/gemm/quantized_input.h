// The input of a quantised linear as left operand: rounded to bf16, or to int8 or e4m3 with scales, its features at the
// places of the weight.
#pragma once

#include "codes.h"
#include "quantized.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

static bool any_nan(const float* x, int64_t count) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= x[i] != x[i];
  return found;
}

// What every thread reads. A segment's rows lie together, one after another: tiles read memory in order.
template <typename Tile, QuantizedKind kKind, typename T>
struct Input {
  using E = typename Tile::Element;
  static constexpr int64_t kPlaces = kSegment<Tile, kKind>;
  const QuantizedLinear& a;
  E* values;         // [segments][tokens][places of the segment]
  float* scales;     // int8 and e4m3: [tokens][scale_groups()]
  int32_t* starts;   // bytes: [segments][tokens], what takes back the offset of the codes

  Input(Scratch& scratch, const QuantizedLinear& a)
      : a(a), values(scratch.take<E>(a.tokens * a.places)), scales(scratch.take<float>(scaled() ? a.tokens * scale_groups() : 0)),
        starts(scratch.take<int32_t>(kSame<Tile, BytesTile> ? a.tokens * segments() : 0)) {}

  bool int8() const { return a.activation == kAsInt8; }
  bool scaled() const { return a.activation != kAsBf16; }
  // Inputs in e4m3 have scales of their own for each group of a weight in blocks.
  bool by_group() const { return kKind == kFp8 && a.activation == kAsFp8 && a.groups > 1 && !a.input_scale; }
  int64_t scale_groups() const { return by_group() ? a.groups : 1; }
  int64_t segments() const { return a.groups * blocks_of(smaller(a.group, a.places), kPlaces); }
  int64_t wide_size() const { return rounded_up(a.places, 16) + 16; }  // put() reads 16 from any place on
  const E* rows(const Segment& segment, int64_t token) const {
    return values + segment.begin * a.tokens + token * segment.count;
  }

  // A row in fp32 at the weight's places, zeros beyond them up to wide_size().
  void gather(float* wide, int64_t token) const {
    const T* row = static_cast<const T*>(a.input) + token * a.input_row;
    const int64_t end = wide_size();
    if (a.order) {
      for (int64_t i = 0; i < a.places; ++i) {
        const int64_t feature = a.order[i];
        wide[i] = 0.0f;
        if (feature < 0) continue;
        widen(wide + i, row + feature, 1);
        if (kKind == kInt4 && a.input_scale) wide[i] *= a.input_scale[feature];
      }
      for (int64_t i = a.places; i < end; ++i) wide[i] = 0.0f;
      return;
    }
    widen(wide, row, a.width);
    if (kKind == kInt4 && a.input_scale) {
      for (int64_t i = 0; i < a.width; ++i) wide[i] *= a.input_scale[i];
    }
    for (int64_t i = a.width; i < end; ++i) wide[i] = 0.0f;
  }

  // Codes, as fp32 in place, and their scale: of -127 to 127, or of e4m3; NaN if anything is not finite, or with a given
  // scale, to whose range infinity is clamped, if anything is NaN. Zeros may follow, up to the next multiple of 16.
  float quantize(float* wide, int64_t count) const {
    float scale = __builtin_nanf("");
    if (int8()) {
      scale = scale_of<kToInt8>(largest_of(wide, count));
    } else if (kKind != kFp8 || !a.input_scale) {
      scale = scale_of<kToE4m3>(largest_of(wide, count));
    } else if (!any_nan(wide, count)) {
      scale = *a.input_scale;
    }
    if (scale != scale) {
      memset(wide, 0, count * sizeof(float));
    } else if (int8()) {
      for (int64_t i = 0; i < count; i += kLanes) store_vector(wide + i, nearest(load_vector(wide + i) / set1(scale)));
    } else {
      for (int64_t i = 0; i < count; i += kLanes) {
        const V quotient = load_vector(wide + i) / set1(scale);
        store_vector(wide + i, nearest_e4m3(max(set1(-kLargestE4m3), min(set1(kLargestE4m3), quotient))));
      }
    }
    return scale;
  }

  void prepare(float* wide, int64_t token) const {
#ifdef __AVX512BF16__
    if constexpr (kSame<Tile, BytesTile>) return prepare_bytes(wide, token);
#endif
    gather(wide, token);
    if (by_group()) {
      for (int64_t group = 0; group < a.groups; ++group) {
        const int64_t begin = group * a.group;
        scales[token * a.groups + group] = quantize(wide + begin, smaller(a.group, a.places - begin));
      }
    } else if (scaled()) {
      scales[token] = quantize(wide, rounded_up(a.places, 16));
    }
    for (int64_t begin = 0; begin < a.places;) {
      const Segment segment = segment_at<kPlaces>(a, begin);
      put(values + segment.begin * a.tokens + token * segment.count, wide + begin, segment.count);
      begin += segment.count;
    }
  }

  // `wide` may be read up to the next multiple of 16.
  void put(E* to, const float* wide, int64_t count) const {
#ifdef __AVX512BF16__
    if constexpr (kSame<Tile, DotTile>) return put_pairs(to, wide, count);
#endif
    if constexpr (!kSame<Tile, FmaTile>) {
      return;
    } else if (scaled()) {
      memcpy(to, wide, count * sizeof(float));
    } else {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store_vector(to + i, round_to_bf16(load_vector(wide + i)));
      float last[kLanes];
      if (i < count) store_vector(last, round_to_bf16(load_vector(wide + i)));
      memcpy(to + i, last, (count - i) * sizeof(float));
    }
  }

#ifdef __AVX512BF16__
  // Of each eight places: as unpack_int4 has them.
  static void put_pairs(Bf16* to, const float* wide, int64_t count) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    for (int64_t i = 0; i < count; i += 16) {
      const __m256bh halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(wide + i));
      __m256i bits = reinterpret_cast<const __m256i&>(halves);
      if constexpr (kKind == kInt4) bits = _mm256_shuffle_epi8(bits, order);
      _mm256_mask_storeu_epi16(to + i, first_lanes(count - i), bits);
    }
  }
  void prepare_bytes(float* wide, int64_t token) const {
    if (a.order || (kKind == kInt4 && a.input_scale)) {
      gather(wide, token);
      write_bytes(wide, a.places, token);
    } else {
      write_bytes(static_cast<const T*>(a.input) + token * a.input_row, a.width, token);
    }
  }
  // A row to codes, for VPDPBUSD; zeros at the places past its end.
  template <typename S>
  void write_bytes(const S* row, int64_t width, int64_t token) const {
    const float scale = scale_of<kToInt8>(largest_of(row, width));
    const Divisor by = divisor(scale);
    scales[token] = scale;
    // What an unsigned code is more than the number it stands for: see unpack_int4.
    const int32_t offset = kKind == kInt8 ? 128 : a.zeros ? 15 : 8;
    int64_t index = 0;
    for (int64_t begin = 0; begin < a.places; ++index) {
      const Segment segment = segment_at<kPlaces>(a, begin);
      uint8_t* to = reinterpret_cast<uint8_t*>(values) + segment.begin * a.tokens + token * segment.count;
      const int64_t there = larger(0, smaller(segment.count, width - begin));
      write_run<kToInt8, false>(to, row + begin, there, scale, by, row + begin, false);
      memset(to + there, 0, segment.count - there);
      starts[index * a.tokens + token] = -offset * arrange(to, segment.count);
      begin += segment.count;
    }
  }
  // The same of codes, in place; returns their sum.
  static int32_t arrange(uint8_t* codes, int64_t count) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 64) {
      const __mmask64 lanes = count - i < 64 ? (uint64_t{1} << (count - i)) - 1 : ~uint64_t{0};
      __m512i some = _mm512_maskz_loadu_epi8(lanes, codes + i);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), some);
      if constexpr (kKind == kInt4) _mm512_mask_storeu_epi8(codes + i, lanes, _mm512_shuffle_epi8(some, order));
    }
    return _mm512_reduce_add_epi32(sum);
  }
#endif
};

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
