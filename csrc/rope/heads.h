// What the forward and the backward of rotary embedding share: the groups of a head, a token's rotation, ways to write.
//
// A token's sines and cosines are computed once and serve all of its heads. Heads are taken sixteen at a time: first the
// sums of all, then their reciprocal roots, then what is written, so that nothing waits for a sum.
#pragma once

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

// Whether an instruction may round (cpu_rope_forward.cpp).
template <typename T>
constexpr bool kMayConvert = kConverts && kSame<T, Bf16>;

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

// Once a head in fp64: one rounding instead of four, in a factor that all elements share.
M4OV_INLINE void reciprocal_roots(float* roots, const float* sums, int64_t dim, double eps) {
  const double part = 1.0 / static_cast<double>(dim);
  for (int h = 0; h < kHeads; ++h) {
    roots[h] = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(sums[h]) * part + eps));
  }
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

M4OV_INLINE int block_of(int64_t heads) { return static_cast<int>(heads < kHeads ? heads : kHeads); }

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
