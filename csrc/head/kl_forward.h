// Forward of the divergence of two heads: over the vocabulary, tile by tile, the running softmax of both for every token
// and the first's mean of what lies between them; or, with both softmaxes known, the sums of the symmetric divergence.
#pragma once

#include "forward.h"
#include "kl.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

M4OV_INLINE V bounded(V largest) { return min(max(largest, set1(-__FLT_MAX__)), set1(__FLT_MAX__)); }

// As add_vector of forward.h for both, with the sum of e^(x - largest x) · ((x - largest x) - (y - largest y)), whose
// two parts are small where the heads are alike.
static void add_gap(float* state, int64_t stride, const float* x_column, const float* y_column, int64_t count) {
  const V far = set1(kFarBelow);
  const V old_x = load_vector(state + kFirstMaximum * stride), old_y = load_vector(state + kSecondMaximum * stride);
  V most_x = old_x, most_y = old_y;  // a NaN among the logits is lost here, and comes back in the sums
  for (int64_t i = 0; i < count; ++i) {
    most_x = max(load_vector(x_column + i * kBlockTokens), most_x);
    most_y = max(load_vector(y_column + i * kBlockTokens), most_y);
  }
  const V shift_x = bounded(most_x), shift_y = bounded(most_y);
  const V back_x = max(far, bounded(old_x) - shift_x), back_y = max(far, bounded(old_y) - shift_y);
  const V again = exp_full(back_x), before = load_vector(state + kFirstSum * stride);
  V gap = if_any(again, again * fma(back_x - back_y, before, load_vector(state + kGap * stride)));
  V sum_x = before * again, sum_y = load_vector(state + kSecondSum * stride) * exp_full(back_y);
  for (int64_t i = 0; i < count; ++i) {
    const V x = load_vector(x_column + i * kBlockTokens) - shift_x;
    const V y = load_vector(y_column + i * kBlockTokens) - shift_y, e = exp_full(x);
    sum_x = sum_x + e;
    sum_y = sum_y + exp_full(y);
    gap = gap + if_any(e, e * (x - y));
  }
  store_vector(state + kFirstMaximum * stride, most_x);
  store_vector(state + kSecondMaximum * stride, most_y);
  store_vector(state + kFirstSum * stride, sum_x);
  store_vector(state + kSecondSum * stride, sum_y);
  store_vector(state + kGap * stride, gap);
}

// `normalizer`: [4][stride], shift and log-sum of each.
static void add_jsd(float* state, const float* normalizer, int64_t stride, const float* x_column, const float* y_column,
                    int64_t count) {
  const V far = set1(kFarBelow), half = set1(0.5f);
  const V shift_x = load_vector(normalizer), log_sum_x = load_vector(normalizer + stride);
  const V shift_y = load_vector(normalizer + 2 * stride), log_sum_y = load_vector(normalizer + 3 * stride);
  V total = load_vector(state + kJsdTotal * stride), first = load_vector(state + kJsdFirst * stride);
  for (int64_t i = 0; i < count; ++i) {
    const V log_p = max(far, load_vector(x_column + i * kBlockTokens) - shift_x - log_sum_x);
    const V log_q = max(far, load_vector(y_column + i * kBlockTokens) - shift_y - log_sum_y);
    const Halfway between = halfway(log_p, log_q);
    const V larger_one = exp_full(max(log_p, log_q)), other = larger_one * between.share;
    total = fma(half * (larger_one + other), from_both(between), total);
    const V p = where_negative(set1(0.0f) - between.gap, other, larger_one);
    first = fma(p, from_first(between), first);
  }
  store_vector(state + kJsdTotal * stride, total);
  store_vector(state + kJsdFirst * stride, first);
}

template <typename Tile, typename T, bool kJsd>
struct KlForward {
  static constexpr int kStates = kJsd ? int(kJsdStates) : int(kKlStates);
  using Mine = typename TwoHeads<Tile, T>::Mine;
  const LinearKlFwd& a;
  const LinearLogprob& shared;
  TwoHeads<Tile, T> heads;
  int64_t blocks, padded, segments;  // tokens in whole blocks
  float* states;                     // [segments][kStates][padded]
  float* normalizer;                 // [4][padded]

  KlForward(Scratch& scratch, const LinearKlFwd& a)
      : a(a), shared(a.first), heads(scratch, a.first, a.second), blocks(heads.first.token_blocks()),
        padded(blocks * kBlockTokens), segments(blocks_of(shared.vocab, segment_rows(shared.vocab))),
        states(scratch.take<float>(segments * kStates * padded)),
        normalizer(scratch.take<float>(kJsd ? 4 * padded : 0)) {}

  float* state(int64_t segment, int64_t block) const {
    return states + segment * kStates * padded + block * kBlockTokens;
  }

  void pack(int64_t block, const Mine& mine) const {
    heads.pack(block, mine);
    for (int64_t lane = 0; kJsd && lane < kBlockTokens; ++lane) {
      const int64_t token = block * kBlockTokens + lane;
      for (int which = 0; which < 4; ++which) {
        const bool there = token < shared.tokens;
        normalizer[which * padded + token] = there ? a.normalizer[which * shared.tokens + token] : 0.0f;
      }
    }
  }

  // One segment of the vocabulary, the tokens of one group.
  void run_segment(int64_t segment, int64_t group, const Mine& mine) const {
    const int64_t begin = segment * segment_rows(shared.vocab);
    const int64_t end = smaller(begin + segment_rows(shared.vocab), shared.vocab);
    const int64_t first_block = group * kGroupBlocks, last_block = smaller(first_block + kGroupBlocks, blocks);
    for (int64_t block = first_block; block < last_block; ++block) {
      for (int which = 0; which < kStates; ++which) {
        const bool maximum = !kJsd && (which == kFirstMaximum || which == kSecondMaximum);
        float* row = state(segment, block) + which * padded;
        for (int64_t lane = 0; lane < kBlockTokens; ++lane) row[lane] = maximum ? -__builtin_inff() : 0.0f;
      }
    }
    for (int64_t row = begin; row < end; row += kTileWords) {
      const int64_t count = smaller(kTileWords, end - row);
      const auto view = heads.first.weight.view(mine.rows, row, count);
      const auto other = heads.second.weight.view(mine.more_rows, row, count);
      for (int64_t block = first_block; block < last_block; ++block) {
        heads.first.make(mine.tile, view, row, count, block);
        heads.second.make(mine.more, other, row, count, block);
        float* to = state(segment, block);
        for (int64_t j = 0; j < heads.first.vectors(block) * kLanes; j += kLanes) {
          if constexpr (kJsd) {
            add_jsd(to + j, normalizer + block * kBlockTokens + j, padded, mine.tile + j, mine.more + j, count);
          } else {
            add_gap(to + j, padded, mine.tile + j, mine.more + j, count);
          }
        }
      }
    }
  }

  static float difference(float x, float largest) {
    return x == largest ? 0.0f : larger_of(x - largest, kFarBelow);  // of infinite ones too
  }
  static float larger_of(float x, float y) { return x > y ? x : y; }

  // Of one token, the segments' states in order.
  void merge(int64_t block, int64_t lane, float (&total)[kStates]) const {
    for (int which = 0; which < kStates; ++which) total[which] = 0.0f;
    if constexpr (kJsd) {
      for (int64_t segment = 0; segment < segments; ++segment) {
        for (int which = 0; which < kStates; ++which) total[which] += state(segment, block)[which * padded + lane];
      }
    } else {
      total[kFirstMaximum] = total[kSecondMaximum] = -__builtin_inff();
      for (int64_t segment = 0; segment < segments; ++segment) {
        float part[kStates];
        for (int which = 0; which < kStates; ++which) part[which] = state(segment, block)[which * padded + lane];
        const float most_x = larger_of(total[kFirstMaximum], part[kFirstMaximum]);
        const float most_y = larger_of(total[kSecondMaximum], part[kSecondMaximum]);
        const float back_x = difference(total[kFirstMaximum], most_x), there_x = difference(part[kFirstMaximum], most_x);
        const float back_y = difference(total[kSecondMaximum], most_y);
        const float there_y = difference(part[kSecondMaximum], most_y);
        const float again = __builtin_expf(back_x), share = __builtin_expf(there_x);
        const float before = total[kGap] + (back_x - back_y) * total[kFirstSum];
        const float more = part[kGap] + (there_x - there_y) * part[kFirstSum];
        total[kGap] = (again == 0.0f ? 0.0f : again * before) + (share == 0.0f ? 0.0f : share * more);
        total[kFirstSum] = again * total[kFirstSum] + share * part[kFirstSum];
        total[kSecondSum] = __builtin_expf(back_y) * total[kSecondSum] + __builtin_expf(there_y) * part[kSecondSum];
        total[kFirstMaximum] = most_x;
        total[kSecondMaximum] = most_y;
      }
    }
  }
};

// Returns the bytes of scratch memory that it needs; does nothing else when there is none.
template <typename Work>
static int64_t kl_forward(const LinearKlFwd& a) {
  const LinearLogprob& shared = a.first;
  Scratch scratch{shared.scratch};
  const Work work(scratch, a);
  const int64_t common = scratch.used;
  Scratch one{shared.scratch, common};
  typename Work::Mine(one, work.heads);
  const int64_t each = one.used - common;
  if (!shared.scratch) return common + each * shared.threads;

  const int64_t groups = blocks_of(work.blocks, kGroupBlocks);
#pragma omp parallel num_threads(shared.threads)
  {
    Scratch rest{shared.scratch, common + each * omp_get_thread_num()};
    const typename Work::Mine mine(rest, work.heads);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < work.blocks; ++block) work.pack(block, mine);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < groups * work.segments; ++unit) {
      work.run_segment(unit % work.segments, unit / work.segments, mine);
    }
#pragma omp for schedule(static)
    for (int64_t token = 0; token < shared.tokens; ++token) {
      float total[Work::kStates];
      work.merge(token / kBlockTokens, token % kBlockTokens, total);
      for (int which = 0; which < Work::kStates; ++which) a.state[which * shared.tokens + token] = total[which];
    }
  }
  return 0;
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
