// Forward: for each block of lanes, over blocks of keys: scores, running softmax, output.
#pragma once

#include "few_lanes.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

// Probabilities (relative to the running maximum) of one block of scores, as right operand of the product with the
// values; updates each lane's running maximum and sum, and gives the factor for what was added up before.
template <typename Tile, typename T>
static void add_block(const float* scores, int64_t keys, int64_t vectors, float unit, float* maximum, float* sum,
                      float* rescale, typename Tile::Element* probabilities) {
  const V factor = set1(unit), floor = set1(-__FLT_MAX__);
  for (int64_t j = 0; j < vectors; ++j) {
    const float* s = scores + j * kLanes;
    const V old = load_vector(maximum + j * kLanes);
    V even = old, odd = old;
    int64_t key = 0;
    for (; key + 2 <= keys; key += 2) {  // a NaN among the scores is lost here, and comes back in the sum
      even = max(load_vector(s + key * kBlockLanes), even);
      odd = max(load_vector(s + (key + 1) * kBlockLanes), odd);
    }
    if (key < keys) even = max(load_vector(s + key * kBlockLanes), even);
    const V most = max(even, odd), shift = max(most, floor) * factor, back = set1(0.0f) - shift;
    // Exactly 1 where the maximum stays, which the 2^x of 16-bit results is not at 0: a lane may pass blocks of keys that
    // it does not see, as many as others in its block of lanes do.
    const V again = where_negative(old - most, power<T>(exponent(old, factor, back)), set1(1.0f));
    store_vector(maximum + j * kLanes, most);
    store_vector(rescale + j * kLanes, again);
    V total = load_vector(sum + j * kLanes) * again, other = set1(0.0f);
    auto* p = probabilities + j * kLanes * Tile::kPair;
    for (key = 0; key + 2 <= keys; key += 2) {
      const V x = power<T>(exponent(load_vector(s + key * kBlockLanes), factor, back));
      const V y = power<T>(exponent(load_vector(s + (key + 1) * kBlockLanes), factor, back));
      total = total + x;
      other = other + y;
      if constexpr (Tile::kPair == 2) {
        put_pairs(p + key * kBlockLanes, x, y);
      } else {
        put_row(p + key * kBlockLanes, x);
        put_row(p + (key + 1) * kBlockLanes, y);
      }
    }
    if (key < keys) {
      const V x = power<T>(exponent(load_vector(s + key * kBlockLanes), factor, back));
      total = total + x;
      put_pairs(p + key * kBlockLanes, x, set1(0.0f));
    }
    store_vector(sum + j * kLanes, total + other);
  }
}

template <typename Tile, typename T>
struct ForwardScratch {
  using E = typename Tile::Element;
  E *queries, *probabilities, *rows;
  E *key_rows, *value_rows;  // of few lanes
  float *scores, *output, *maximum, *sum, *rescale;

  ForwardScratch(Scratch& scratch, int64_t dim) {
    key_rows = scratch.take<E>(kBlockKeys * dim);
    value_rows = scratch.take<E>(kBlockKeys * rounded_up(dim, kLanes));
    queries = scratch.take<E>(dim * kBlockLanes);
    rows = scratch.take<E>(kSame<E, T> ? 0 : dim * kBlockLanes);
    probabilities = scratch.take<E>(kBlockKeys * kBlockLanes);
    scores = scratch.take<float>(kBlockKeys * kBlockLanes);
    output = scratch.take<float>(2 * rounded_up(dim, kLanes) * kBlockLanes);  // [dim][lane], then [lane][dim]
    maximum = scratch.take<float>(kBlockLanes);
    sum = scratch.take<float>(kBlockLanes);
    rescale = scratch.take<float>(kBlockLanes);
  }
};

template <typename T>
static void write_lanes(const VarlenAttentionFwd& a, const Lanes& lanes, const float* rows, int64_t stride,
                        const float* maximum, const float* sum) {
  const int64_t dim = a.shared.dim;
  for (int64_t i = 0; i < lanes.count; ++i) {
    T* to = static_cast<T*>(a.output) + (lanes.token[i] * a.shared.heads + lanes.head[i]) * dim;
    float* normalizer = a.normalizer + lanes.head[i] * a.shared.tokens_q + lanes.token[i];
    const int64_t apart = a.shared.heads * a.shared.tokens_q;
    if (lanes.limit[i] == 0) {  // sees no key
      memset(to, 0, dim * sizeof(T));
      normalizer[0] = -__builtin_inff();
      normalizer[apart] = 0.0f;
    } else {
      narrow(to, rows + i * stride, 1.0f / sum[i], dim);
      normalizer[0] = maximum[i];
      normalizer[apart] = sum[i];
    }
  }
}

template <typename Tile, typename T>
static void forward_block(const VarlenAttentionFwd& a, const ForwardScratch<Tile, T>& w, const Rows<Tile, T>& keys,
                          const Rows<Tile, T>& values, const Panels<Tile>& transposed, int64_t n, int64_t h,
                          int64_t block) {
  using E = typename Tile::Element;
  constexpr int64_t kPair = Tile::kPair, kStep = kBlockLanes * kPair;
  const VarlenAttention& shared = a.shared;
  const int64_t dim = shared.dim, padded = rounded_up(dim, kLanes);
  const Sequence s = sequence_at(shared, n);
  const Lanes lanes(shared, s, h, block);
  const bool few = few_lanes(shared, s);
  const E* rows[kBlockLanes];
  lane_rows(rows, w.rows, static_cast<const T*>(shared.q), shared.q_row, shared.q_head, lanes, dim);
  if (lanes.most > 0) pack_columns<Tile>(w.queries, kStep, rows, lanes.count, lanes.columns, dim);
  for (int64_t i = 0; i < lanes.columns; ++i) {
    w.maximum[i] = -__builtin_inff();
    w.sum[i] = 0.0f;
  }
  for (int64_t key = 0; key < lanes.most; key += kBlockKeys) {
    const int64_t count = smaller(kBlockKeys, lanes.most - key);
    if (few) {
      const Block<E> left = keys.block(w.key_rows, dim, h, s, key, count);
      multiply_few<Tile, T>(w.scores, left, w.queries, count, lanes.vectors(), dim, values.ahead(h, s, key, count));
    } else {
      multiply_rows<Tile, T>(w.scores, keys.at(h, s.first_key + key), keys.stride(), w.queries, count, lanes.vectors(),
                             dim);
    }
    if (key + count > lanes.fewest) hide(w.scores, key, count, lanes);
    add_block<Tile, T>(w.scores, count, lanes.vectors(), shared.scale * kExponentUnit<T>, w.maximum, w.sum, w.rescale,
                       w.probabilities);
    if (few) {
      const Block<E> right = values.block(w.value_rows, padded, h, s, key, count);
      add_values<Tile>(Sums{w.output, padded, key ? w.rescale : nullptr}, w.probabilities, right, lanes.count, count,
                       keys.ahead(h, s, key + count, smaller(kBlockKeys, lanes.most - key - count)));
      continue;
    }
    const E* panel = transposed.at(h, n, s, key);
    const int64_t stride = Panels<Tile>::stride(s, key), steps = (count + kPair - 1) / kPair;
    if (key == 0) {
      multiply<Tile, kZero>(w.output, kBlockLanes, panel, stride, w.probabilities, kStep, dim, lanes.vectors(), steps);
    } else {
      multiply<Tile, kScale>(w.output, kBlockLanes, panel, stride, w.probabilities, kStep, dim, lanes.vectors(), steps,
                             w.rescale);
    }
  }
  if (few) return write_lanes<T>(a, lanes, w.output, padded, w.maximum, w.sum);
  float* by_lane = w.output + dim * kBlockLanes;
  if (lanes.most > 0) unpack_columns(by_lane, dim, w.output, kBlockLanes, lanes.count, dim);
  write_lanes<T>(a, lanes, by_lane, dim, w.maximum, w.sum);
}

// Returns the bytes of scratch memory that it needs; does nothing else when there is none.
template <typename Tile, typename T>
static int64_t forward(const VarlenAttentionFwd& a) {
  const VarlenAttention& shared = a.shared;
  Scratch scratch{shared.scratch};
  int64_t* panels = scratch.take<int64_t>(shared.sequences + 1);
  int64_t* blocks = scratch.take<int64_t>(shared.sequences + 1);
  const Rows<Tile, T> keys(scratch, shared.k, shared.k_row, shared.k_head, shared);
  const Rows<Tile, T> values(scratch, shared.v, shared.v_row, shared.v_head, shared);
  const Panels<Tile> transposed(scratch, shared);
  const int64_t common = scratch.used;
  Scratch one{shared.scratch, common};
  ForwardScratch<Tile, T>(one, shared.dim);
  const int64_t each = one.used - common;
  if (!shared.scratch) return common + each * shared.threads;

  number_units(panels, shared, [&](const Sequence& s) {
    return few_lanes(shared, s) ? 0 : (s.keys + kBlockKeys - 1) / kBlockKeys;
  });
  number_units(blocks, shared, [&](const Sequence& s) { return lane_blocks(shared, s) * shared.kv_heads; });
  const int64_t panel_units = panels[shared.sequences] * shared.kv_heads, block_units = blocks[shared.sequences];
  const int team = team_size(shared);
  const int64_t chunk = larger(1, block_units / (16 * team));
#pragma omp parallel num_threads(team)
  {
    Scratch mine{shared.scratch, common + each * omp_get_thread_num()};
    const ForwardScratch<Tile, T> w(mine, shared.dim);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < panel_units; ++unit) {
      const int64_t h = unit % shared.kv_heads, n = owner(panels, shared.sequences, unit / shared.kv_heads);
      const Sequence s = sequence_at(shared, n);
      const int64_t key = (unit / shared.kv_heads - panels[n]) * kBlockKeys, first = s.first_key + key;
      const int64_t count = smaller(kBlockKeys, s.keys - key);
      keys.convert(h, first, count);
      values.convert(h, first, count);
      transposed.pack(h, n, s, key, values.at(h, first), values.stride());
    }
#pragma omp for schedule(dynamic, chunk)
    for (int64_t unit = 0; unit < block_units; ++unit) {
      const int64_t n = owner(blocks, shared.sequences, unit), rest = unit - blocks[n];
      const int64_t many = (blocks[n + 1] - blocks[n]) / shared.kv_heads;
      // The last block of a causal sequence is the longest: it goes first.
      forward_block<Tile, T>(a, w, keys, values, transposed, n, rest % shared.kv_heads, many - 1 - rest / shared.kv_heads);
    }
  }
  return 0;
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
