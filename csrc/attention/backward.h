// Backward: dV = Pᵀ·dO, dS = P·(dO·Vᵀ - rowsum(dO·O)), dQ = dS·K·scale, dK = dSᵀ·Q·scale, with P recomputed.
//
// A unit of work owns the gradients of a range of a sequence's keys for one key head, and walks over the blocks of
// lanes that see them. Short sequences have one range; long ones a few, whose shares of dQ are summed in order.
#pragma once

#include "plan.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

// Ranges are whole blocks of keys; they, and so all sums, depend on the sequence alone.
constexpr int64_t kRangeKeys = 512, kMostRanges = 4;
M4OV_INLINE int64_t range_keys(const Sequence& s) {
  if (s.keys <= kRangeKeys) return larger(s.keys, 1);
  const int64_t ranges = smaller(kMostRanges, (s.keys + kRangeKeys - 1) / kRangeKeys);
  return rounded_up((s.keys + ranges - 1) / ranges, kBlockKeys);
}
M4OV_INLINE int64_t range_count(const Sequence& s) {
  const int64_t each = range_keys(s);
  return larger(1, (s.keys + each - 1) / each);
}

template <typename Tile, typename T>
struct BackwardScratch {
  using E = typename Tile::Element;
  int64_t padded;  // dim, rounded up to whole vectors
  E *queries, *grads;              // [dim / kPair][lane][kPair]
  E *query_steps, *grad_steps;     // [lane / kPair][padded][kPair]
  E *query_rows, *grad_rows;       // converted
  E *probabilities, *grad_scores;  // [key][lane]
  E* grad_pairs;                   // [key / kPair][lane][kPair]
  float *scores, *grad_probabilities;  // [key][lane]
  float *grad_q;                       // [dim][lane], then [lane][dim]
  float *grad_k, *grad_v;              // [key][padded]
  float *row, *other_row, *shift, *inverse, *delta;

  BackwardScratch(Scratch& scratch, int64_t dim, int64_t keys) : padded(rounded_up(dim, kLanes)) {
    constexpr int64_t kBlock = kBlockKeys * kBlockLanes;
    queries = scratch.take<E>(dim * kBlockLanes);
    grads = scratch.take<E>(dim * kBlockLanes);
    query_steps = scratch.take<E>(padded * kBlockLanes);
    grad_steps = scratch.take<E>(padded * kBlockLanes);
    query_rows = scratch.take<E>(kSame<E, T> ? 0 : dim * kBlockLanes);
    grad_rows = scratch.take<E>(kSame<E, T> ? 0 : dim * kBlockLanes);
    scores = scratch.take<float>(kBlock);
    grad_probabilities = scratch.take<float>(kBlock);
    probabilities = scratch.take<E>(kBlock);
    grad_scores = scratch.take<E>(kBlock);
    grad_pairs = Tile::kPair == 1 ? grad_scores : scratch.take<E>(kBlock);
    grad_q = scratch.take<float>(2 * dim * kBlockLanes);
    row = scratch.take<float>(dim);
    other_row = scratch.take<float>(dim);
    shift = scratch.take<float>(kBlockLanes);
    inverse = scratch.take<float>(kBlockLanes);
    delta = scratch.take<float>(kBlockLanes);
    grad_k = scratch.take<float>(padded * keys);
    grad_v = scratch.take<float>(padded * keys);
  }
};

static float dot(const float* x, const float* y, int64_t count) {
  Pair sum = both(set1(0.0f));
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) sum = fma(load(x + i), load(y + i), sum);
  if (i < count) sum = fma(load_tail(x + i, count - i), load_tail(y + i, count - i), sum);
  return lane_sum(sum);
}

// Everything about the lanes that all blocks of keys need: queries and output gradients as operands; what to subtract
// from scores and from the gradients of probabilities.
template <typename Tile, typename T>
static void prepare_lanes(const VarlenAttentionBwd& a, const BackwardScratch<Tile, T>& w, const Lanes& lanes) {
  using E = typename Tile::Element;
  constexpr int64_t kPair = Tile::kPair;
  const VarlenAttention& shared = a.shared;
  const int64_t dim = shared.dim;
  const E *queries[kBlockLanes], *grads[kBlockLanes];
  const T* grad_output = static_cast<const T*>(a.grad_output);
  lane_rows(queries, w.query_rows, static_cast<const T*>(shared.q), shared.q_row, shared.q_head, lanes, dim);
  lane_rows(grads, w.grad_rows, grad_output, a.grad_row, a.grad_head, lanes, dim);
  pack_columns<Tile>(w.queries, kBlockLanes * kPair, queries, lanes.count, lanes.columns, dim);
  pack_columns<Tile>(w.grads, kBlockLanes * kPair, grads, lanes.count, lanes.columns, dim);
  pack_steps<Tile>(w.query_steps, w.padded * kPair, queries, lanes.count, w.padded, dim);
  pack_steps<Tile>(w.grad_steps, w.padded * kPair, grads, lanes.count, w.padded, dim);
  for (int64_t i = 0; i < lanes.columns; ++i) {
    w.shift[i] = __builtin_inff();  // of a lane that sees nothing: probabilities 0
    w.inverse[i] = w.delta[i] = 0.0f;
    if (lanes.limit[i] == 0) continue;
    const float* normalizer = a.normalizer + lanes.head[i] * shared.tokens_q + lanes.token[i];
    w.shift[i] = normalizer[0] * (shared.scale * kExponentUnit<T>);  // the product that the forward subtracted
    w.inverse[i] = 1.0f / normalizer[shared.heads * shared.tokens_q];
    widen(w.row, grad_output + lanes.token[i] * a.grad_row + lanes.head[i] * a.grad_head, dim);
    widen(w.other_row, static_cast<const T*>(a.output) + (lanes.token[i] * shared.heads + lanes.head[i]) * dim, dim);
    w.delta[i] = dot(w.row, w.other_row, dim);
  }
}

// Scores → probabilities, and the gradients of probabilities → those of scores (without the scale), as operands.
template <typename Tile, typename T>
static void differentiate(const BackwardScratch<Tile, T>& w, int64_t keys, int64_t vectors, float unit) {
  constexpr int64_t kPair = Tile::kPair;
  const V factor = set1(unit);
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t first = j * kLanes;
    const V back = set1(0.0f) - load_vector(w.shift + first), delta = load_vector(w.delta + first);
    const V inverse = load_vector(w.inverse + first);
    for (int64_t key = 0; key < keys; key += kPair) {
      V grad[2] = {set1(0.0f), set1(0.0f)};
      for (int64_t i = 0; i < kPair && key + i < keys; ++i) {
        const int64_t at = (key + i) * kBlockLanes + first;
        const V p = power<T>(exponent(load_vector(w.scores + at), factor, back)) * inverse;
        grad[i] = p * (load_vector(w.grad_probabilities + at) - delta);
        put_row(w.probabilities + at, p);
        put_row(w.grad_scores + at, grad[i]);
      }
      if constexpr (kPair == 2) put_pairs(w.grad_pairs + key * kBlockLanes + first * kPair, grad[0], grad[1]);
    }
  }
}

struct Range {
  int64_t first, last;  // keys
  float* share;         // of dQ, [token][head][dim], or null where the range is the only one
};

template <typename Tile, typename T>
static void backward_block(const VarlenAttentionBwd& a, const BackwardScratch<Tile, T>& w, const Rows<Tile, T>& keys,
                           const Rows<Tile, T>& values, const Panels<Tile>& transposed, int64_t n, int64_t h,
                           const Sequence& s, const Range& range, const Lanes& lanes) {
  constexpr int64_t kPair = Tile::kPair, kStep = kBlockLanes * kPair;
  const VarlenAttention& shared = a.shared;
  const int64_t dim = shared.dim, heads = shared.heads, columns = w.padded / kLanes;
  const int64_t last = smaller(range.last, lanes.most), lane_steps = (lanes.count + kPair - 1) / kPair;
  prepare_lanes(a, w, lanes);
  for (int64_t key = range.first; key < last; key += kBlockKeys) {
    const int64_t count = smaller(kBlockKeys, last - key), steps = (count + kPair - 1) / kPair;
    multiply_rows<Tile, T>(w.scores, keys.at(h, s.first_key + key), keys.stride(), w.queries, count, lanes.vectors(),
                           dim);
    multiply_rows<Tile, T>(w.grad_probabilities, values.at(h, s.first_key + key), values.stride(), w.grads, count,
                           lanes.vectors(), dim);
    if (key + count > lanes.fewest) hide(w.scores, key, count, lanes);
    differentiate(w, count, lanes.vectors(), shared.scale * kExponentUnit<T>);
    const int64_t at = (key - range.first) * w.padded;
    multiply<Tile, kKeep>(w.grad_v + at, w.padded, w.probabilities, kBlockLanes, w.grad_steps, w.padded * kPair, count,
                          columns, lane_steps);
    multiply<Tile, kKeep>(w.grad_k + at, w.padded, w.grad_scores, kBlockLanes, w.query_steps, w.padded * kPair, count,
                          columns, lane_steps);
    const auto* panel = transposed.at(h, n, s, key);
    const int64_t stride = Panels<Tile>::stride(s, key);
    if (key == range.first) {
      multiply<Tile, kZero>(w.grad_q, kBlockLanes, panel, stride, w.grad_pairs, kStep, dim, lanes.vectors(), steps);
    } else {
      multiply<Tile, kKeep>(w.grad_q, kBlockLanes, panel, stride, w.grad_pairs, kStep, dim, lanes.vectors(), steps);
    }
  }
  float* by_lane = w.grad_q + dim * kBlockLanes;
  unpack_columns(by_lane, dim, w.grad_q, kBlockLanes, lanes.count, dim);
  for (int64_t i = 0; i < lanes.count; ++i) {
    const int64_t place = (lanes.token[i] * heads + lanes.head[i]) * dim;
    if (range.share) {
      memcpy(range.share + place, by_lane + i * dim, dim * sizeof(float));
    } else {
      narrow(static_cast<T*>(a.grad_q) + place, by_lane + i * dim, shared.scale, dim);
    }
  }
}

template <typename T>
static void no_query_gradient(const VarlenAttentionBwd& a, const Lanes& lanes) {
  const int64_t dim = a.shared.dim;
  for (int64_t i = 0; i < lanes.count; ++i) {
    memset(static_cast<T*>(a.grad_q) + (lanes.token[i] * a.shared.heads + lanes.head[i]) * dim, 0, dim * sizeof(T));
  }
}

template <typename Tile, typename T>
static void backward_range(const VarlenAttentionBwd& a, const BackwardScratch<Tile, T>& w, const Rows<Tile, T>& keys,
                           const Rows<Tile, T>& values, const Panels<Tile>& transposed, int64_t n, int64_t h,
                           int64_t number, float* shares) {
  const VarlenAttention& shared = a.shared;
  const int64_t dim = shared.dim;
  const Sequence s = sequence_at(shared, n);
  const int64_t each = range_keys(s), blocks = lane_blocks(shared, s);
  Range range = {number * each, smaller(s.keys, (number + 1) * each), nullptr};
  if (range_count(s) > 1) range.share = shares + number * shared.tokens_q * shared.heads * dim;
  const int64_t count = range.last - range.first;
  memset(w.grad_k, 0, count * w.padded * sizeof(float));
  memset(w.grad_v, 0, count * w.padded * sizeof(float));
  for (int64_t block = 0; block < blocks; ++block) {
    const Lanes lanes(shared, s, h, block);
    if (lanes.most > range.first) {
      backward_block(a, w, keys, values, transposed, n, h, s, range, lanes);
    } else if (!range.share) {
      no_query_gradient<T>(a, lanes);
    }
  }
  for (int64_t key = 0; key < count; ++key) {
    const int64_t place = ((s.first_key + range.first + key) * shared.kv_heads + h) * dim;
    narrow(static_cast<T*>(a.grad_k) + place, w.grad_k + key * w.padded, shared.scale, dim);
    narrow(static_cast<T*>(a.grad_v) + place, w.grad_v + key * w.padded, 1.0f, dim);
  }
}

// The shares of the ranges that the block of lanes sees, in order; they overwrite the first.
template <typename T>
static void add_shares(const VarlenAttentionBwd& a, const Sequence& s, const Lanes& lanes, float* shares) {
  const VarlenAttention& shared = a.shared;
  const int64_t dim = shared.dim, each = range_keys(s), apart = shared.tokens_q * shared.heads * dim;
  if (lanes.most == 0) return no_query_gradient<T>(a, lanes);
  for (int64_t i = 0; i < lanes.count; ++i) {
    const int64_t place = (lanes.token[i] * shared.heads + lanes.head[i]) * dim;
    float* sum = shares + place;
    for (int64_t number = 1; number * each < lanes.most; ++number) {
      const float* share = shares + number * apart + place;
      for (int64_t k = 0; k < dim; ++k) sum[k] += share[k];
    }
    narrow(static_cast<T*>(a.grad_q) + place, sum, shared.scale, dim);
  }
}

// Returns the bytes of scratch memory that it needs; does nothing else when there is none.
template <typename Tile, typename T>
static int64_t backward(const VarlenAttentionBwd& a) {
  const VarlenAttention& shared = a.shared;
  Scratch scratch{shared.scratch};
  int64_t* panels = scratch.take<int64_t>(shared.sequences + 1);
  int64_t* ranges = scratch.take<int64_t>(shared.sequences + 1);
  int64_t* blocks = scratch.take<int64_t>(shared.sequences + 1);
  int64_t most_ranges = 1, most_keys = 1;
  for (int64_t n = 0; n < shared.sequences; ++n) {
    const Sequence s = sequence_at(shared, n);
    most_ranges = larger(most_ranges, range_count(s));
    most_keys = larger(most_keys, range_keys(s));
  }
  const Rows<Tile, T> keys(scratch, shared.k, shared.k_row, shared.k_head, shared);
  const Rows<Tile, T> values(scratch, shared.v, shared.v_row, shared.v_head, shared);
  const Panels<Tile> transposed(scratch, shared);
  const int64_t share = shared.tokens_q * shared.heads * shared.dim;
  float* shares = scratch.take<float>(most_ranges > 1 ? most_ranges * share : 0);
  const int64_t common = scratch.used;
  Scratch one{shared.scratch, common};
  BackwardScratch<Tile, T>(one, shared.dim, most_keys);
  const int64_t each = one.used - common;
  if (!shared.scratch) return common + each * shared.threads;

  number_units(panels, shared, [](const Sequence& s) { return (s.keys + kBlockKeys - 1) / kBlockKeys; });
  number_units(ranges, shared, [&](const Sequence& s) { return range_count(s) * shared.kv_heads; });
  number_units(blocks, shared, [&](const Sequence& s) { return range_count(s) > 1 ? lane_blocks(shared, s) : 0; });
  const int64_t panel_units = panels[shared.sequences] * shared.kv_heads, range_units = ranges[shared.sequences];
  const int64_t block_units = blocks[shared.sequences] * shared.kv_heads;
  const int team = team_size(shared);
  const int64_t chunk = larger(1, range_units / (16 * team));
#pragma omp parallel num_threads(team)
  {
    Scratch mine{shared.scratch, common + each * omp_get_thread_num()};
    const BackwardScratch<Tile, T> w(mine, shared.dim, most_keys);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < panel_units; ++unit) {
      const int64_t h = unit % shared.kv_heads, n = owner(panels, shared.sequences, unit / shared.kv_heads);
      const Sequence s = sequence_at(shared, n);
      const int64_t key = (unit / shared.kv_heads - panels[n]) * kBlockKeys, first = s.first_key + key;
      const int64_t count = smaller(kBlockKeys, s.keys - key);
      keys.convert(h, first, count);
      values.convert(h, first, count);
      transposed.pack(h, n, s, key, keys.at(h, first), keys.stride());
    }
#pragma omp for schedule(dynamic, chunk)
    for (int64_t unit = 0; unit < range_units; ++unit) {  // the first range of a causal sequence is seen by most
      const int64_t n = owner(ranges, shared.sequences, unit), rest = unit - ranges[n];
      backward_range(a, w, keys, values, transposed, n, rest % shared.kv_heads, rest / shared.kv_heads, shares);
    }
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < block_units; ++unit) {
      const int64_t n = owner(blocks, shared.sequences, unit / shared.kv_heads);
      const Sequence s = sequence_at(shared, n);
      const Lanes lanes(shared, s, unit % shared.kv_heads, unit / shared.kv_heads - blocks[n]);
      add_shares<T>(a, s, lanes, shares);
    }
  }
  return 0;
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
