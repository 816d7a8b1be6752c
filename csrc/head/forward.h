// Forward: over the vocabulary, tile by tile, the running softmax of every token, its target's logit and its largest.
#pragma once

#include "logits.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

// The vocabulary is cut into this many segments at most. Each has a state of its own for every token, merged in order at
// the end: no bit depends on which thread took which segment.
constexpr int64_t kSegments = 64;
// Tokens that share a pass over the weight: as many as fit into the outer caches, packed.
constexpr int64_t kGroupBlocks = 16;

M4OV_INLINE int64_t segment_rows(int64_t vocab) { return rounded_up(blocks_of(vocab, kSegments), kTileWords); }

struct Tops {
  float* values;
  int64_t* indices;
};

// Whether (value, index) comes before (other, second): NaN before all, then the larger, then the smaller index.
M4OV_INLINE bool before(float value, int64_t index, float other, int64_t second) {
  if (value != value || other != other) return value != value && (other == other || index < second);
  return value > other || (value == other && index < second);
}

// Into a sorted list of k, if it belongs there.
static void insert(const Tops& list, int64_t k, float value, int64_t index) {
  if (list.indices[k - 1] >= 0 && !before(value, index, list.values[k - 1], list.indices[k - 1])) return;
  int64_t at = k - 1;
  while (at > 0 && (list.indices[at - 1] < 0 || before(value, index, list.values[at - 1], list.indices[at - 1]))) {
    list.values[at] = list.values[at - 1];
    list.indices[at] = list.indices[at - 1];
    --at;
  }
  list.values[at] = value;
  list.indices[at] = index;
}

// A running state of `lanes` tokens: [kHeadStates][stride].
struct Running {
  float* state;
  int64_t stride;
  float* row(HeadState which) const { return state + which * stride; }
};

template <bool kWantCentred, bool kWantTotal>
static void add_vector(const Running& to, int64_t lane, const float* column, int64_t count, const float* class_weight) {
  const V floor = set1(-__FLT_MAX__), ceiling = set1(__FLT_MAX__), far = set1(kFarBelow);
  const V old = load_vector(to.row(kMaximum) + lane);
  V even = old, odd = old;  // a NaN among the logits is lost here, and comes back in the sum
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    even = max(load_vector(column + i * kBlockTokens), even);
    odd = max(load_vector(column + (i + 1) * kBlockTokens), odd);
  }
  if (i < count) even = max(load_vector(column + i * kBlockTokens), even);
  // Of an infinite logit the sum is infinite then, and not NaN.
  const V most = max(even, odd), shift = min(max(most, floor), ceiling);
  const V back = max(far, min(max(old, floor), ceiling) - shift), again = exp_full(back);
  V sum = load_vector(to.row(kSum) + lane), other = set1(0.0f);
  V centred = set1(0.0f), total = set1(0.0f);
  if constexpr (kWantCentred) centred = again * fma(back, sum, load_vector(to.row(kCentred) + lane));
  sum = sum * again;
  const auto add = [&](int64_t at, V& into) {
    const V x = load_vector(column + at * kBlockTokens), d = x - shift, e = exp_full(d);
    into = into + e;
    if constexpr (kWantCentred) centred = fma(e, max(far, d), centred);
    if constexpr (kWantTotal) total = total + (class_weight ? x * set1(class_weight[at]) : x);
  };
  for (i = 0; i + 2 <= count; i += 2) {
    add(i, sum);
    add(i + 1, other);
  }
  if (i < count) add(i, sum);
  store_vector(to.row(kMaximum) + lane, most);
  store_vector(to.row(kSum) + lane, sum + other);
  if constexpr (kWantCentred) store_vector(to.row(kCentred) + lane, centred);
  if constexpr (kWantTotal) store_vector(to.row(kTotal) + lane, load_vector(to.row(kTotal) + lane) + total);
}

template <typename Tile, typename T>
struct Forward {
  using E = typename Tile::Element;
  const LinearLogprobFwd& a;
  const LinearLogprob& shared;
  Logits<Tile, T> logits;
  int64_t segments, padded;  // tokens, in whole blocks
  float* states;             // [segments][kHeadStates][padded]
  float* top_values;         // [threads][tokens][top_k]
  int64_t* top_indices;

  struct Mine {
    E* rows;
    float* tile;
    Mine(Scratch& scratch, const Logits<Tile, T>& logits)
        : rows(scratch.take<E>(larger(logits.weight.buffer_size(kTileWords), logits.hidden.buffer_size(kBlockTokens)))),
          tile(scratch.take<float>(kTileWords * kBlockTokens)) {}
  };

  Forward(Scratch& scratch, const LinearLogprobFwd& a)
      : a(a), shared(a.shared), logits(scratch, a.shared), segments(blocks_of(shared.vocab, segment_rows(shared.vocab))),
        padded(logits.token_blocks() * kBlockTokens), states(scratch.take<float>(segments * kHeadStates * padded)),
        top_values(scratch.take<float>(shared.threads * shared.tokens * a.top_k)),
        top_indices(scratch.take<int64_t>(shared.threads * shared.tokens * a.top_k)) {}

  Running state(int64_t segment, int64_t block) const {
    return {states + segment * kHeadStates * padded + block * kBlockTokens, padded};
  }
  Tops tops(int64_t thread, int64_t token) const {
    const int64_t at = (thread * shared.tokens + token) * a.top_k;
    return {top_values + at, top_indices + at};
  }

  void add_tile(const float* tile, int64_t first, int64_t count, int64_t segment, int64_t block, int64_t thread) const {
    const Running to = state(segment, block);
    const float* class_weight = shared.class_weight ? shared.class_weight + first : nullptr;
    for (int64_t j = 0; j < logits.vectors(block); ++j) {
      const float* column = tile + j * kLanes;
      if (a.want_centred && a.want_total) {
        add_vector<true, true>(to, j * kLanes, column, count, class_weight);
      } else if (a.want_centred) {
        add_vector<true, false>(to, j * kLanes, column, count, class_weight);
      } else if (a.want_total) {
        add_vector<false, true>(to, j * kLanes, column, count, class_weight);
      } else {
        add_vector<false, false>(to, j * kLanes, column, count, class_weight);
      }
    }
    const int64_t* target = shared.target + block * kBlockTokens;
    const int64_t number = shared.first + first;  // of the tile's first row
    for (int64_t lane = 0; lane < logits.lanes(block); ++lane) {
      const int64_t hit = target[lane] - number;
      if (hit >= 0 && hit < count) to.row(kTarget)[lane] = tile[hit * kBlockTokens + lane];
    }
    if (a.top_k > 0) {
      for (int64_t lane = 0; lane < logits.lanes(block); ++lane) {
        const Tops list = tops(thread, block * kBlockTokens + lane);
        for (int64_t i = 0; i < count; ++i) insert(list, a.top_k, tile[i * kBlockTokens + lane], number + i);
      }
    }
  }

  // One segment of the vocabulary, the tokens of one group.
  void run_segment(int64_t segment, int64_t group, const Mine& mine, int64_t thread) const {
    const int64_t begin = segment * segment_rows(shared.vocab);
    const int64_t end = smaller(begin + segment_rows(shared.vocab), shared.vocab);
    const int64_t first_block = group * kGroupBlocks;
    const int64_t last_block = smaller(first_block + kGroupBlocks, logits.token_blocks());
    for (int64_t block = first_block; block < last_block; ++block) {
      const Running to = state(segment, block);
      for (int64_t lane = 0; lane < kBlockTokens; ++lane) {
        for (int which = 0; which < kHeadStates; ++which) to.row(HeadState(which))[lane] = 0.0f;
        to.row(kMaximum)[lane] = -__builtin_inff();
      }
    }
    for (int64_t row = begin; row < end; row += kTileWords) {
      const int64_t count = smaller(kTileWords, end - row);
      const auto view = logits.weight.view(mine.rows, row, count);
      for (int64_t block = first_block; block < last_block; ++block) {
        logits.make(mine.tile, view, row, count, block);
        if (logits.kept(row)) logits.keep(mine.tile, row, count, block);
        add_tile(mine.tile, row, count, segment, block, thread);
      }
    }
  }

  static float difference(float x, float largest) {
    if (x == largest) return 0.0f;  // infinite ones too
    const float d = x - largest;
    return d < kFarBelow ? kFarBelow : d;
  }

  // The segments' states in order.
  void merge(int64_t block) const {
    const int64_t tokens = shared.tokens;
    for (int64_t lane = 0; lane < logits.lanes(block); ++lane) {
      const int64_t token = block * kBlockTokens + lane, target = shared.target[token] - shared.first;
      float maximum = -__builtin_inff(), sum = 0.0f, centred = 0.0f, total = 0.0f, hit = 0.0f;
      for (int64_t segment = 0; segment < segments; ++segment) {
        const Running from = state(segment, block);
        const float most = from.row(kMaximum)[lane], more = from.row(kSum)[lane];
        total += from.row(kTotal)[lane];
        if (most == -__builtin_inff()) {  // nothing but -inf, or NaN, which the sum keeps
          sum += more;
          continue;
        }
        const float larger_one = most > maximum ? most : maximum;
        const float back = difference(maximum, larger_one), there = difference(most, larger_one);
        const float again = __builtin_expf(back), share = __builtin_expf(there);
        centred = again * (centred + back * sum) + share * (from.row(kCentred)[lane] + there * more);
        sum = again * sum + share * more;
        maximum = larger_one;
      }
      if (target >= 0 && target < shared.vocab) {
        hit = state(target / segment_rows(shared.vocab), block).row(kTarget)[lane];
      }
      const float values[kHeadStates] = {maximum, sum, hit, a.want_centred ? centred : 0.0f, total};
      for (int which = 0; which < kHeadStates; ++which) a.state[which * tokens + token] = values[which];
    }
  }

  void merge_tops(int64_t token) const {
    const Tops to{a.top_values + token * a.top_k, a.top_indices + token * a.top_k};
    for (int64_t i = 0; i < a.top_k; ++i) {
      to.values[i] = -__builtin_inff();
      to.indices[i] = -1;
    }
    for (int64_t thread = 0; thread < shared.threads; ++thread) {
      const Tops from = tops(thread, token);
      for (int64_t i = 0; i < a.top_k && from.indices[i] >= 0; ++i) insert(to, a.top_k, from.values[i], from.indices[i]);
    }
  }
};

// Returns the bytes of scratch memory that it needs; does nothing else when there is none.
template <typename Tile, typename T>
static int64_t forward(const LinearLogprobFwd& a) {
  const LinearLogprob& shared = a.shared;
  Scratch scratch{shared.scratch};
  const Forward<Tile, T> work(scratch, a);
  const int64_t common = scratch.used;
  Scratch one{shared.scratch, common};
  typename Forward<Tile, T>::Mine(one, work.logits);
  const int64_t each = one.used - common;
  if (!shared.scratch) return common + each * shared.threads;

  const int64_t blocks = work.logits.token_blocks(), groups = blocks_of(blocks, kGroupBlocks);
#pragma omp parallel num_threads(shared.threads)
  {
    const int64_t thread = omp_get_thread_num();
    Scratch rest{shared.scratch, common + each * thread};
    const typename Forward<Tile, T>::Mine mine(rest, work.logits);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < shared.threads * shared.tokens * a.top_k; ++i) work.top_indices[i] = -1;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) work.logits.pack(block, mine.rows);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < groups * work.segments; ++unit) {
      work.run_segment(unit % work.segments, unit / work.segments, mine, thread);
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      work.merge(block);
      for (int64_t lane = 0; a.top_k > 0 && lane < work.logits.lanes(block); ++lane) {
        work.merge_tops(block * kBlockTokens + lane);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
