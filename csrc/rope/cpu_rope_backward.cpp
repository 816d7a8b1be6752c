// Backward of rotary embedding, and of the RMSNorm before it: the rotation the other way round, and then, with
// x^ = x·root and w the weight, dx = root·(d·w - x^·mean(d·w·x^)) and dw = sum of d·x^. In fp32 until what is written.
#include "heads.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

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

void rope_bwd(const RopeBwd& a) {
  with_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
