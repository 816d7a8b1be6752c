// Rotary embedding of queries and keys, with the RMSNorm of each head before it: forward and backward.
//
// A token's sines and cosines are computed once and serve all of its heads. Heads are taken sixteen at a time: first the
// sums of all, then their reciprocal roots, then what is written, so that nothing waits for a sum.
#include "../common/parallel.h"
#include "../common/simd.h"
#include "angles.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int kHeads = 16;                                      // in a block
constexpr int kMaxGroups = kMaxRopeDim / kGroup + 3;            // of a head
constexpr int kMaxHalfGroups = kMaxHalf / kGroup + 1;

// A head's elements as groups: of the first half, of the second half, of the rest, which is not rotated. Each of the
// three ends with a partial group where it is no multiple of kGroup, or, with `kOverlap`, with one that covers some of
// the elements of the group before again, which is faster and only good where nothing is summed.
struct Layout {
  int64_t dim, half, rest;
  int half_groups, rest_groups;
  bool overlap;

  Layout(int64_t dim, int64_t half_dim, bool may_overlap)
      : dim(dim),
        half(half_dim),
        rest(dim - 2 * half_dim),
        half_groups(static_cast<int>((half + kGroup - 1) / kGroup)),
        rest_groups(static_cast<int>((rest + kGroup - 1) / kGroup)),
        overlap(may_overlap && half >= kGroup) {}

  int groups() const { return 2 * half_groups + rest_groups; }
  bool whole(int group) const { return group < half_groups && offset(group) + kGroup <= half; }  // of the halves' groups
  int64_t offset(int group) const {
    const int64_t i = static_cast<int64_t>(group) * kGroup;
    return overlap && i + kGroup > half ? half - kGroup : i;
  }
};

template <typename T>
M4OV_INLINE Pair get(const T* p, int64_t count) {
  return count >= kGroup ? load(p) : load_tail(p, count);
}
template <bool kStream, typename T>
M4OV_INLINE void set(T* p, Pair x, int64_t count) {
  if (count < kGroup) return store_tail(p, x, count);
  put<kStream>(p, x);
}

// ---- Rounding. Most of what the forward does in bf16 is rounding, ten operations a pair, and three where an instruction
// may do it, which takes denormal numbers for zeros. So where the smallest number in some heads says that there will be
// none, kNormal. Each such rounding turns the order of the elements (round_turned), of which kTurns count what has been.

template <typename T>
constexpr bool kMayConvert = kConverts && kSame<T, Bf16>;
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

// Sines and cosines of one token in the order of T's pairs, and as they are after one rounding and after two.
template <typename T>
struct Rotation {
  Pair sine[kMaxHalfGroups], cosine[kMaxHalfGroups];
  Pair turned_sine[2][kMaxHalfGroups], turned_cosine[2][kMaxHalfGroups];
  float sines[kMaxHalf + kGroup] = {}, cosines[kMaxHalf + kGroup] = {};  // beyond the half: any finite numbers
  float smallest = 0.0f;  // of both, but zero, where kMayConvert

  void set(Angles& angles, int64_t token, const Layout& layout, bool rounded) {
    angles.next(token, sines, cosines);
    Smallest least;
    for (int g = 0; g < layout.half_groups; ++g) {
      sine[g] = paired<T>(sines + layout.offset(g)), cosine[g] = paired<T>(cosines + layout.offset(g));
      if (rounded) sine[g] = round_to<T>(sine[g]), cosine[g] = round_to<T>(cosine[g]);
      if (kMayConvert<T> && rounded) {
        least.add(sine[g]), least.add(cosine[g]);
        turned_sine[0][g] = reordered<1>(sine[g]), turned_cosine[0][g] = reordered<1>(cosine[g]);
        turned_sine[1][g] = reordered<2>(sine[g]), turned_cosine[1][g] = reordered<2>(cosine[g]);
      }
    }
    smallest = least.value();
  }
  template <int kTurns>
  const Pair* sines_after() const {
    if constexpr (kTurns == 0) return sine;
    return turned_sine[kTurns - (kTurns > 0)];
  }
  template <int kTurns>
  const Pair* cosines_after() const {
    if constexpr (kTurns == 0) return cosine;
    return turned_cosine[kTurns - (kTurns > 0)];
  }
};

template <typename T>
static void load_weight(Pair* weight, const T* source, const Layout& layout) {
  for (int g = 0; g < layout.half_groups; ++g) {
    const int64_t i = layout.offset(g);
    weight[g] = get(source + i, layout.half - i);
    weight[layout.half_groups + g] = get(source + layout.half + i, layout.half - i);
  }
  for (int g = 0; g < layout.rest_groups; ++g) {
    const int64_t i = static_cast<int64_t>(g) * kGroup;
    weight[2 * layout.half_groups + g] = get(source + 2 * layout.half + i, layout.rest - i);
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

// Once a head in fp64: one rounding instead of four, in a factor that all elements share.
static void reciprocal_roots(float* roots, const float* sums, int64_t dim, double eps) {
  const double part = 1.0 / static_cast<double>(dim);
  for (int h = 0; h < kHeads; ++h) {
    roots[h] = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(sums[h]) * part + eps));
  }
}

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

// How a tensor is written. Streamed: past the caches, head by head. Where heads are no multiple of a vector, blocks of
// them are: they are gathered in the cache and then streamed.
enum Way : int { kStored, kStreamed, kGathered };

template <typename T>
static Way way_of(bool large, const void* output, int64_t heads, int64_t dim, int64_t half) {
  if (!large || !vector_aligned(output)) return kStored;
  if (half % kGroup == 0 && dim % kGroup == 0) return kStreamed;
  const int64_t size = dim * static_cast<int64_t>(sizeof(T));
  return heads * size % kVectorBytes == 0 && kHeads * size % kVectorBytes == 0 ? kGathered : kStored;
}

template <typename T>
static void stream_copy(T* target, const T* source, int64_t count) {
  constexpr int64_t kStep = kVectorBytes / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; i += kStep) {
    stream_vector(reinterpret_cast<float*>(target + i), load_vector(reinterpret_cast<const float*>(source + i)));
  }
}

static int block_of(int64_t heads) { return static_cast<int>(heads < kHeads ? heads : kHeads); }

// ---- Forward

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

// ---- Backward: the rotation the other way round, and then, with x^ = x·root and w the weight,
// dx = root·(d·w - x^·mean(d·w·x^)) and dw = sum of d·x^. In fp32 until what is written.

// What the heads of one block need after the sums are known.
struct Block {
  Pair turned[kHeads * kMaxGroups];
  float squares[kHeads], products[kHeads], roots[kHeads];
};

template <typename T, bool kNorm, bool kStream>
static void turn_head(T* out, const T* grad, const T* x, int64_t next_grad, int64_t next_x, const Layout& layout,
                      const Rotation<T>& rotation, const Pair* weight, Block& block, int h) {
  const int n = layout.half_groups;
  Pair* turned = block.turned + h * layout.groups();
  Pair squares = both(set1(0.0f)), products = squares;
  const auto keep = [&](int group, Pair d, const T* source, int64_t left) {
    const Pair value = get(source, left);
    turned[group] = d;
    squares = fma(value, value, squares);
    products = fma(d * weight[group], value, products);
  };
  for (int g = 0; g < n; ++g) {
    const int64_t i = layout.offset(g), j = layout.half + i, left = layout.half - i;
    prefetch<true>(grad + next_grad + i);
    prefetch<true>(grad + next_grad + j);
    const Pair a = get(grad + i, left), b = get(grad + j, left), sine = rotation.sine[g], cosine = rotation.cosine[g];
    const Pair first = a * cosine + b * sine, second = b * cosine - a * sine;
    if constexpr (kNorm) {
      prefetch<true>(x + next_x + i);
      prefetch<true>(x + next_x + j);
      keep(g, first, x + i, left);
      keep(n + g, second, x + j, left);
    } else {
      set<kStream>(out + i, first, left);
      set<kStream>(out + j, second, left);
    }
  }
  for (int g = 0; g < layout.rest_groups; ++g) {
    const int64_t i = static_cast<int64_t>(g) * kGroup, left = layout.rest - i, j = 2 * layout.half + i;
    const Pair a = get(grad + j, left);
    if constexpr (kNorm) {
      keep(2 * n + g, a, x + j, left);
    } else {
      set<kStream>(out + j, a, left);
    }
  }
  if constexpr (kNorm) {
    block.squares[h] = lane_sum(squares);
    block.products[h] = lane_sum(products);
  }
}

template <typename T, bool kWeight, bool kStream>
static void norm_gradient(T* out, const T* x, const Layout& layout, const Pair* weight, Pair* grad_weight,
                          const Block& block, int h, int64_t dim) {
  const int n = layout.half_groups;
  const Pair* turned = block.turned + h * layout.groups();
  const Pair root = both(set1(block.roots[h]));
  const Pair mean = both(set1(block.products[h] * block.roots[h] / static_cast<float>(dim)));
  const auto write = [&](int group, int64_t i, int64_t left) {
    const Pair normed = get(x + i, left) * root;
    if constexpr (kWeight) grad_weight[group] = fma(turned[group], normed, grad_weight[group]);
    set<kStream>(out + i, root * (turned[group] * weight[group] - normed * mean), left);
  };
  for (int g = 0; g < n; ++g) {
    const int64_t i = layout.offset(g), left = layout.half - i;
    write(g, i, left);
    write(n + g, layout.half + i, left);
  }
  for (int g = 0; g < layout.rest_groups; ++g) {
    const int64_t i = static_cast<int64_t>(g) * kGroup;
    write(2 * n + g, 2 * layout.half + i, layout.rest - i);
  }
}

// partial: where the token's part of the weight's gradient is added, or null.
template <typename T, bool kNorm, bool kWeight, bool kStream>
static void turn_heads(const RopeBwdTensor& t, int64_t token, const RopeBwd& a, const Layout& layout,
                       const Rotation<T>& rotation, const Pair* weight, T* gathered, Block& block, float* partial) {
  const T* grad = static_cast<const T*>(t.grad_output) + token * t.grad_token_stride;
  const T* x = kNorm ? static_cast<const T*>(t.input) + token * t.token_stride : nullptr;
  T* out = static_cast<T*>(t.grad_input) + token * t.heads * a.dim;
  Pair grad_weight[kMaxGroups];
  if constexpr (kWeight) {
    for (int g = 0; g < layout.groups(); ++g) grad_weight[g] = both(set1(0.0f));
  }
  for (int64_t first = 0; first < t.heads; first += kHeads) {
    const int count = block_of(t.heads - first);
    T* target = gathered ? gathered : out + first * a.dim;
    for (int h = 0; h < count; ++h) {
      turn_head<T, kNorm, kStream>(target + h * a.dim, grad + (first + h) * t.grad_head_stride,
                                   kNorm ? x + (first + h) * t.head_stride : nullptr, t.grad_token_stride,
                                   t.token_stride, layout, rotation, weight, block, h);
    }
    if constexpr (kNorm) {
      for (int h = count; h < kHeads; ++h) block.squares[h] = 0.0f;
      reciprocal_roots(block.roots, block.squares, a.dim, a.eps);
      for (int h = 0; h < count; ++h) {
        norm_gradient<T, kWeight, kStream>(target + h * a.dim, x + (first + h) * t.head_stride, layout, weight,
                                           grad_weight, block, h, a.dim);
      }
    }
    if (gathered) stream_copy(out + first * a.dim, gathered, count * a.dim);
  }
  if constexpr (kWeight) {
    for (int g = 0; g < layout.groups(); ++g) {
      store(partial + g * kGroup, load(partial + g * kGroup) + grad_weight[g]);
    }
  }
}

template <typename T, bool kStream>
static void turn_token(const RopeBwdTensor& t, int64_t token, const RopeBwd& a, const Layout& layout,
                       const Rotation<T>& rotation, const Pair* weight, T* gathered, Block& block, float* partial) {
  const auto turn = !t.weight        ? turn_heads<T, false, false, kStream>
                    : !t.grad_weight ? turn_heads<T, true, false, kStream>
                                     : turn_heads<T, true, true, kStream>;
  turn(t, token, a, layout, rotation, weight, gathered, block, partial);
}

// Adds the blocks' partial gradients of a weight, in their order.
template <typename T>
static void sum_partials(const RopeBwd& a, int which, const Layout& layout) {
  const int64_t size = rope_partial(a.dim);
  T* out = static_cast<T*>(a.tensors[which].grad_weight);
  const auto write = [&](int group, int64_t i, int64_t left) {
    Pair sum = both(set1(0.0f));
    for (int64_t block = 0; block < a.blocks; ++block) {
      sum = sum + load(a.partials + (2 * block + which) * size + group * kGroup);
    }
    left >= kGroup ? store(out + i, sum) : store_tail(out + i, sum, left);
  };
  for (int g = 0; g < layout.half_groups; ++g) {
    const int64_t i = layout.offset(g), left = layout.half - i;
    write(g, i, left);
    write(layout.half_groups + g, layout.half + i, left);
  }
  for (int g = 0; g < layout.rest_groups; ++g) {
    const int64_t i = static_cast<int64_t>(g) * kGroup;
    write(2 * layout.half_groups + g, 2 * layout.half + i, layout.rest - i);
  }
}

template <typename T>
static void backward(const RopeBwd& a) {
  const int64_t row = (a.tensors[0].heads + a.tensors[1].heads) * a.dim * static_cast<int64_t>(sizeof(T));
  const bool large = a.tokens * row >= kStreamBytes;
  const Layout layout(a.dim, a.half, !a.tensors[0].weight && !a.tensors[1].weight);
  parallel_ranges(a.blocks, a.tokens * row, a.threads, [&](int64_t begin, int64_t end) {
    Angles angles(a.angles, a.half, a.tokens * begin / a.blocks);
    Rotation<T> rotation;
    Block block;
    Pair weights[2][kMaxGroups];
    Way ways[2];
    alignas(64) T buffer[kHeads * kMaxRopeDim];
    for (int i = 0; i < 2; ++i) {
      const RopeBwdTensor& t = a.tensors[i];
      if (t.weight) load_weight(weights[i], static_cast<const T*>(t.weight), layout);
      ways[i] = way_of<T>(large, t.grad_input, t.heads, a.dim, a.half);
    }
    for (int64_t n = begin; n < end; ++n) {
      float* partials = a.partials ? a.partials + 2 * n * rope_partial(a.dim) : nullptr;
      if (partials) memset(partials, 0, 2 * rope_partial(a.dim) * sizeof(float));
      const int64_t last = a.tokens * (n + 1) / a.blocks;
      for (int64_t token = a.tokens * n / a.blocks; token < last; ++token) {
        rotation.set(angles, token, layout, false);
        for (int i = 0; i < 2; ++i) {
          const auto turn = ways[i] == kStreamed ? turn_token<T, true> : turn_token<T, false>;
          turn(a.tensors[i], token, a, layout, rotation, weights[i], ways[i] == kGathered ? buffer : nullptr, block,
               partials ? partials + i * rope_partial(a.dim) : nullptr);
        }
      }
    }
    if (large) fence();
  });
  for (int i = 0; i < 2; ++i) {
    if (a.tensors[i].grad_weight) sum_partials<T>(a, i, layout);
  }
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

void rope_bwd(const RopeBwd& a) {
  with_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
