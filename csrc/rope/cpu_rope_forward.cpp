// Rotary embedding of queries and keys, with the RMSNorm of each head before it: forward.
#include "heads.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// ---- Rounding. Most of what the forward does in bf16 is rounding, ten operations a pair, and three where an instruction
// may do it, which takes denormal numbers for zeros. So where the smallest number in some heads says that there will be
// none, kNormal. Each such rounding turns the order of the elements (round_turned), of which kTurns count what has been.

// Products of at least this much are normal, and so are the sums of two that are rounded to 8 bits (or they are zero).
constexpr float kNormalBound = 0x1p-110f;

// Roundings in the norm, before the weight and after it.
template <int kNumerics>
constexpr int kBeforeWeight = kNumerics == kHf ? 1 : 0;
template <int kNumerics>
constexpr int kAfterWeight = kNumerics == kHf ? 2 : kNumerics == kVllm ? 1 : 0;

template <typename T, bool kNormal>
M4OV_INLINE Pair rounded(Pair x) {
  if constexpr (kNormal) {
    return round_turned(x);
  } else {
    return round_to<T>(x);
  }
}
template <bool kStream, bool kNormal, int kTurns, typename T>
M4OV_INLINE void set_rounded(T* p, Pair x, int64_t count) {
  if constexpr (kNormal) {
    if (count >= kGroup) return put_turned<kStream, kTurns>(p, x);
    T buffer[kGroup];
    put_turned<false, kTurns>(buffer, x);
    memcpy(p, buffer, count * sizeof(T));
  } else {
    set<kStream>(p, x, count);
  }
}

// A weight, also as it is after a rounding, and the smallest of its magnitudes but zero, and 1.
struct Weight {
  Pair plain[kMaxGroups], turned[kMaxGroups];
  float smallest = 1.0f;

  template <typename T>
  void load(const T* source, const Layout& layout) {
    load_weight(plain, source, layout);
    if constexpr (kMayConvert<T>) {
      Smallest least;
      for (int g = 0; g < layout.groups(); ++g) least.add(plain[g]), turned[g] = reordered<1>(plain[g]);
      smallest = least.value() < 1.0f ? least.value() : 1.0f;
    }
  }
};

#ifdef __AVX512BF16__
M4OV_INLINE float square_sum_by_pairs(const Bf16* x, int64_t dim) {
  const auto add = [](__m512 sum, __m512i pairs) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(pairs), reinterpret_cast<const __m512bh&>(pairs));
  };
  __m512 even = _mm512_setzero_ps(), odd = even;
  int64_t i = 0;
  for (; i + 2 * kGroup <= dim; i += 2 * kGroup) {
    even = add(even, _mm512_loadu_si512(x + i));
    odd = add(odd, _mm512_loadu_si512(x + i + kGroup));
  }
  for (; i < dim; i += kGroup) {
    const int64_t left = dim - i;
    const __mmask32 lanes = left < kGroup ? (uint32_t{1} << left) - 1 : ~uint32_t{0};
    even = add(even, _mm512_maskz_loadu_epi16(lanes, x + i));
  }
  return lane_sum(V{even} + V{odd});
}
#endif

template <typename T>
M4OV_INLINE float square_sum(const T* x, int64_t dim) {
#ifdef __AVX512BF16__
  if constexpr (kSame<T, Bf16>) {
    const float sum = square_sum_by_pairs(x, dim);
    if (!(sum < 0x1p-90f)) return sum;  // the instruction makes zeros of denormal numbers
  }
#endif
  Pair even = both(set1(0.0f)), odd = even;
  int64_t i = 0;
  for (; i + 2 * kGroup <= dim; i += 2 * kGroup) {
    const Pair first = load(x + i), second = load(x + i + kGroup);
    even = fma(first, first, even);
    odd = fma(second, second, odd);
  }
  for (; i < dim; i += kGroup) {
    const Pair last = get(x + i, dim - i);
    even = fma(last, last, even);
  }
  return lane_sum(even + odd);
}

// ---- Heads

template <typename T, int kNumerics, bool kNormal>
M4OV_INLINE Pair normalised(Pair x, Pair root, Pair weight) {
  Pair y = x * root;
  if constexpr (kNumerics == kHf) y = rounded<T, kNormal>(y);
  y = y * weight;
  return kNumerics == kFp32 ? y : rounded<T, kNormal>(y);
}

// What turns the halves of a head: in the order that the elements have then.
struct Turn {
  const Pair *weight, *sine, *cosine;
  float root;
};

// Groups g and, two at a time, g + 1. One after the other they would wait for their own results most of the time: each goes
// through up to eight roundings and products, and a core looks no further ahead than one group.
template <typename T, int kNumerics, bool kNorm, bool kStream, bool kNormal, int kTogether, bool kWhole>
M4OV_INLINE void turn_groups(T* out, const T* x, int64_t next, const Layout& layout, const Turn& by, int g) {
  constexpr int kTurns = kNormal && kNorm ? kAfterWeight<kNumerics> : 0;
  const Pair root = both(set1(by.root));
  int64_t i[kTogether], left[kTogether];
  Pair a[kTogether], b[kTogether], ac[kTogether], bs[kTogether], bc[kTogether], as[kTogether];
#pragma GCC unroll 2
  for (int j = 0; j < kTogether; ++j) {
    i[j] = layout.offset(g + j), left[j] = kWhole ? kGroup : layout.half - i[j];
    prefetch(x + next + i[j]);
    prefetch(x + layout.half + next + i[j]);
    a[j] = get(x + i[j], left[j]), b[j] = get(x + layout.half + i[j], left[j]);
  }
  if constexpr (kNorm) {
#pragma GCC unroll 2
    for (int j = 0; j < kTogether; ++j) {
      a[j] = normalised<T, kNumerics, kNormal>(a[j], root, by.weight[g + j]);
      b[j] = normalised<T, kNumerics, kNormal>(b[j], root, by.weight[layout.half_groups + g + j]);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kTogether; ++j) {
    ac[j] = a[j] * by.cosine[g + j], bs[j] = b[j] * by.sine[g + j];
    bc[j] = b[j] * by.cosine[g + j], as[j] = a[j] * by.sine[g + j];
    if constexpr (kNumerics != kFp32) {
      ac[j] = rounded<T, kNormal>(ac[j]), bs[j] = rounded<T, kNormal>(bs[j]);
      bc[j] = rounded<T, kNormal>(bc[j]), as[j] = rounded<T, kNormal>(as[j]);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kTogether; ++j) {
    set_rounded<kStream, kNormal, kTurns + 1>(out + i[j], ac[j] - bs[j], left[j]);
    set_rounded<kStream, kNormal, kTurns + 1>(out + layout.half + i[j], bc[j] + as[j], left[j]);
  }
}

template <typename T, int kNumerics, bool kNorm, bool kStream, bool kNormal>
static void write_head(T* out, const T* x, int64_t next, const Layout& layout, const Rotation<T>& rotation,
                       const Weight& weights, float root) {
  constexpr int kTurns = kNormal && kNorm ? kAfterWeight<kNumerics> : 0;
  const Turn by{kNormal && kBeforeWeight<kNumerics> ? weights.turned : weights.plain,
                rotation.template sines_after<kTurns>(), rotation.template cosines_after<kTurns>(), root};
  int g = 0;
  for (; layout.whole(g + 1); g += 2) {
    turn_groups<T, kNumerics, kNorm, kStream, kNormal, 2, true>(out, x, next, layout, by, g);
  }
  for (; g < layout.half_groups; ++g) {
    turn_groups<T, kNumerics, kNorm, kStream, kNormal, 1, false>(out, x, next, layout, by, g);
  }
  for (g = 0; g < layout.rest_groups; ++g) {
    const int64_t i = 2 * layout.half + static_cast<int64_t>(g) * kGroup, left = layout.dim - i;
    Pair a = get(x + i, left);
    if constexpr (kNorm) {
      a = normalised<T, kNumerics, kNormal>(a, both(set1(root)), by.weight[2 * layout.half_groups + g]);
    }
    set_rounded<kStream, kNormal && kNorm, kTurns>(out + i, a, left);
  }
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Whether no product of some heads' elements, their roots, and what is at least `factor` can be denormal.
template <bool kNorm>
static bool all_normal(const Bf16* x, int heads, int64_t stride, int64_t dim, const float* roots, float factor) {
  Smallest smallest;
  if (dim < kGroup) return false;
  for (int h = 0; h < heads; ++h) {
    const Bf16* head = x + h * stride;
    for (int64_t i = 0; i + kGroup <= dim; i += kGroup) smallest.add(head + i);
    smallest.add(head + dim - kGroup);
  }
  const float least = smallest.value() * factor;
  bool normal = true;
  for (int h = 0; h < heads; ++h) normal &= (kNorm ? least * roots[h] : least) >= kNormalBound;
  return normal;
}

template <typename T, int kNumerics, bool kNorm, bool kStream>
static void write_heads(const RopeFwdTensor& t, int64_t token, const RopeFwd& a, const Layout& layout,
                        const Rotation<T>& rotation, const Weight& weight, T* gathered) {
  const T* x = static_cast<const T*>(t.input) + token * t.token_stride;
  T* out = static_cast<T*>(t.output) + token * t.heads * a.dim;
  for (int64_t first = 0; first < t.heads; first += kHeads) {
    const int count = block_of(t.heads - first);
    const T* source = x + first * t.head_stride;
    T* target = gathered ? gathered : out + first * a.dim;
    float sums[kHeads] = {}, roots[kHeads] = {};
    if constexpr (kNorm) {
      for (int h = 0; h < count; ++h) sums[h] = square_sum(source + h * t.head_stride, a.dim);
      reciprocal_roots(roots, sums, a.dim, a.eps);
    }
    const auto write = [&](auto normal) {
      for (int h = 0; h < count; ++h) {
        write_head<T, kNumerics, kNorm, kStream, decltype(normal)::value>(
            target + h * a.dim, source + h * t.head_stride, t.token_stride, layout, rotation, weight, roots[h]);
      }
    };
    if constexpr (kMayConvert<T> && kNumerics != kFp32) {
      if (all_normal<kNorm>(source, count, t.head_stride, a.dim, roots, weight.smallest * rotation.smallest)) {
        write(Flag<true>{});
      } else {
        write(Flag<false>{});
      }
    } else {
      write(Flag<false>{});
    }
    if (gathered) stream_copy(out + first * a.dim, gathered, count * a.dim);
  }
}

template <typename T, int kNumerics, bool kStream>
static void write_token(const RopeFwdTensor& t, int64_t token, const RopeFwd& a, const Layout& layout,
                        const Rotation<T>& rotation, const Weight& weight, T* gathered) {
  constexpr int kPlain = kNumerics == kFp32 ? kFp32 : kHf;  // they differ in the norm only
  const auto write = t.weight ? write_heads<T, kNumerics, true, kStream> : write_heads<T, kPlain, false, kStream>;
  write(t, token, a, layout, rotation, weight, gathered);
}

template <typename T, int kNumerics>
static void forward(const RopeFwd& a) {
  const int64_t row = (a.tensors[0].heads + a.tensors[1].heads) * a.dim * static_cast<int64_t>(sizeof(T));
  const bool large = a.tokens * row >= kStreamBytes;
  // Both tensors share the rotation's groups: where one of them has sums, neither has groups that overlap.
  const Layout layout(a.dim, a.half, !a.tensors[0].weight && !a.tensors[1].weight);
  parallel_ranges(a.tokens, a.tokens * row, a.threads, [&](int64_t begin, int64_t end) {
    Angles angles(a.angles, a.half, begin);
    Rotation<T> rotation;
    Weight weights[2];
    Way ways[2];
    alignas(64) T buffer[kHeads * kMaxRopeDim];
    for (int i = 0; i < 2; ++i) {
      const RopeFwdTensor& t = a.tensors[i];
      if (t.weight) weights[i].load(static_cast<const T*>(t.weight), layout);
      ways[i] = way_of<T>(large, t.output, t.heads, a.dim, a.half);
    }
    for (int64_t token = begin; token < end; ++token) {
      rotation.set(angles, token, layout, kNumerics != kFp32);
      for (int i = 0; i < 2; ++i) {
        const auto write = ways[i] == kStreamed ? write_token<T, kNumerics, true> : write_token<T, kNumerics, false>;
        write(a.tensors[i], token, a, layout, rotation, weights[i], ways[i] == kGathered ? buffer : nullptr);
      }
    }
    if (large) fence();
  });
}

}  // namespace

void rope_fwd(const RopeFwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (kSame<T, float>) {
      forward<T, kFp32>(a);  // nothing is rounded on the way
    } else {
      a.numerics == kHf ? forward<T, kHf>(a) : a.numerics == kVllm ? forward<T, kVllm>(a) : forward<T, kFp32>(a);
    }
  });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
