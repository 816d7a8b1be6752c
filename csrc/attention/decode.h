// Single queries over a prefix and keys of their own.
//
// Samples of one prompt are one block of lanes. Of the keys of the prefix, scores and sums of values are made for all of
// them at once; of a sample's own keys, for its own lanes; and the softmax between the two for all again. A lane's sums
// run over the same blocks of keys, in the same order, as in forward.h: they have the same bits.
#pragma once

#include "forward.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

#ifdef __AVX512F__
template <typename T, int kRows>
static void half_rows(float* c, const float* a, int64_t lda, const float* b, int64_t dim) {
  const int64_t part = kSame<T, float> ? kPart : dim;
  for (int64_t k = 0; k < dim; k += part) {
    __m256 sum[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum[i] = _mm256_setzero_ps();
    for (int64_t step = k; step < smaller(k + part, dim); ++step) {
      const __m256 column = _mm256_loadu_ps(b + step * kBlockLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) sum[i] = _mm256_fmadd_ps(_mm256_set1_ps(a[i * lda + step]), column, sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      float* to = c + i * kBlockLanes;
      _mm256_storeu_ps(to, k ? _mm256_add_ps(sum[i], _mm256_loadu_ps(to)) : sum[i]);
    }
  }
}
#endif

// multiply_rows for lanes that half a vector holds: with AVX-512 half the work, and the same sums.
template <typename Tile, typename T>
static void multiply_own(float* c, const typename Tile::Element* a, int64_t lda, const typename Tile::Element* b,
                         int64_t rows, int64_t lanes, int64_t dim) {
#ifdef __AVX512F__
  if constexpr (kSame<typename Tile::Element, float>) {
    if (lanes <= kLanes / 2) {
      int64_t i = 0;
      for (; i + 8 <= rows; i += 8) half_rows<T, 8>(c + i * kBlockLanes, a + i * lda, lda, b, dim);
      for (; i + 2 <= rows; i += 2) half_rows<T, 2>(c + i * kBlockLanes, a + i * lda, lda, b, dim);
      if (i < rows) half_rows<T, 1>(c + i * kBlockLanes, a + i * lda, lda, b, dim);
      return;
    }
  }
#endif
  multiply_rows<Tile, T>(c, a, lda, b, rows, blocks_of(lanes, kLanes), dim);
}

template <typename Tile, typename T>
struct Decode {
  using E = typename Tile::Element;
  static constexpr int64_t kPair = Tile::kPair, kStep = kBlockLanes * kPair;
  const DecodeAttention& a;
  VarlenAttentionFwd common;  // what is shared with forward.h, which sees no sequences here
  const Rows<Tile, T> keys, values;
  int64_t group, window, most;  // lanes of a sample; those in whole vectors; samples of a cluster
  int64_t padded;               // a head's width in whole vectors
  int64_t* clusters;            // [rows + 1]: the first row of each

  struct Mine {
    ForwardScratch<Tile, T> w;
    float* begun;
    Mine(Scratch& scratch, const Decode& work)
        : w(scratch, work.a.dim), begun(scratch.take<float>(kBlockLanes * work.padded)) {}
  };

  Decode(Scratch& scratch, const DecodeAttention& a)
      : a(a), common{varlen(a), a.output, nullptr}, keys(scratch, a.k, a.kv_heads * a.dim, a.dim, common.shared),
        values(scratch, a.v, a.kv_heads * a.dim, a.dim, common.shared), group(a.heads / a.kv_heads),
        window(rounded_up(group, kLanes)), most((kBlockLanes - window) / group + 1), padded(rounded_up(a.dim, kLanes)),
        clusters(scratch.take<int64_t>(a.rows + 1)) {
    common.normalizer = scratch.take<float>(2 * a.heads * a.rows);
  }

  static VarlenAttention varlen(const DecodeAttention& a) {
    const int64_t q_row = a.heads * a.dim, k_row = a.kv_heads * a.dim;
    return {a.q,   a.k,   a.v,   nullptr, nullptr, 0,       a.rows, 0, a.heads, a.kv_heads, a.dim,     q_row,     a.dim,
            k_row, a.dim, k_row, a.dim,   a.scale, 1, a.dtype, a.threads, a.scratch};
  }

  // How many clusters there are.
  int64_t find_clusters() const {
    int64_t count = 0;
    for (int64_t row = 0; row < a.rows; ++row) {
      const bool more = row > 0 && row - clusters[count - 1] < most && a.prefix_keys[row] > 0 &&
                        a.prefix_first[row] == a.prefix_first[row - 1] && a.prefix_keys[row] == a.prefix_keys[row - 1];
      if (!more) clusters[count++] = row;
    }
    clusters[count] = a.rows;
    return count;
  }

  Sequence sequence(int64_t row) const {
    const int64_t prefix = a.prefix_keys[row];
    return {row, 1, a.own_first[row] - prefix, prefix + a.own_keys[row], a.prefix_first[row], prefix};
  }

  Lanes lanes_of(int64_t first, int64_t members, int64_t h) const {
    Lanes lanes;
    lanes.count = members * group;
    lanes.columns = rounded_up(lanes.count, kLanes);
    lanes.fewest = INT64_MAX;
    lanes.most = 0;
    for (int64_t m = 0, i = 0; m < members; ++m) {
      const int64_t sees = a.prefix_keys[first + m] + a.own_keys[first + m];
      lanes.fewest = smaller(lanes.fewest, sees);
      lanes.most = larger(lanes.most, sees);
      for (int64_t g = 0; g < group; ++g, ++i) {
        lanes.limit[i] = static_cast<int32_t>(sees);
        lanes.token[i] = first + m;
        lanes.head[i] = h * group + g;
      }
    }
    for (int64_t i = lanes.count; i < lanes.columns; ++i) lanes.limit[i] = 0;
    return lanes;
  }

  // Scores of the keys from `key` on, `shared` of them in the prefix. A sample's own are written over whole vectors, and
  // over those the next sample's.
  void scores(const Mine& mine, int64_t first, int64_t members, int64_t h, const Lanes& lanes, int64_t key,
              int64_t count, int64_t shared) const {
    const ForwardScratch<Tile, T>& w = mine.w;
    if (shared > 0) {
      const Block<E> left = keys.block(w.key_rows, a.dim, h, sequence(first), key, shared);
      multiply_rows<Tile, T>(w.scores, left.rows, left.stride, w.queries, shared, lanes.vectors(), a.dim);
    }
    for (int64_t m = 0; m < members; ++m) {
      const Sequence s = sequence(first + m);
      const int64_t begin = key + shared, own = smaller(key + count, s.keys) - begin;
      if (own <= 0) continue;
      const Block<E> left = keys.block(w.key_rows, a.dim, h, s, begin, own);
      values.ahead(h, s, begin, own).fetch(0, own);
      multiply_own<Tile, T>(w.scores + shared * kBlockLanes + m * group, left.rows, left.stride,
                            w.queries + m * group * kPair, own, group, a.dim);
    }
  }

  // Values of the same keys, to the output. A sample's own keys begin with the last of the prefix where that is the first
  // of a pair.
  void add(const Mine& mine, int64_t first, int64_t members, int64_t h, const Lanes& lanes, int64_t key, int64_t count,
           int64_t shared) const {
    const ForwardScratch<Tile, T>& w = mine.w;
    const int64_t together = shared / kPair * kPair;
    if (together > 0) {
      const Block<E> right = values.block(w.value_rows, padded, h, sequence(first), key, together);
      const Sums sums{mine.begun, padded, nullptr, nullptr, true};
      add_values<Tile>(sums, w.probabilities, right, lanes.count, together, Ahead{});
    }
    for (int64_t m = 0; m < members; ++m) {
      const Sequence s = sequence(first + m);
      const int64_t begin = key + together, own = smaller(key + count, s.keys) - begin, lane = m * group;
      if (key >= s.keys) continue;  // a lane that sees nothing of a block stays as it is
      const Block<E> right = own > 0 ? values.block(w.value_rows, padded, h, s, begin, own) : Block<E>{};
      const Sums sums{w.output, padded, key ? w.rescale : nullptr, together ? mine.begun : nullptr};
      add_values<Tile>(sums.at(lane, 0), w.probabilities + together * kBlockLanes + lane * kPair, right, group,
                       larger(own, 0), Ahead{});
    }
  }

  void run(int64_t first, int64_t members, int64_t h, const Mine& mine) const {
    const ForwardScratch<Tile, T>& w = mine.w;
    const Lanes lanes = lanes_of(first, members, h);
    const E* rows[kBlockLanes];
    lane_rows(rows, w.rows, static_cast<const T*>(a.q), common.shared.q_row, a.dim, lanes, a.dim);
    const int64_t columns = rounded_up((members - 1) * group + window, kLanes);  // what a sample's vectors reach
    pack_columns<Tile>(w.queries, kStep, rows, lanes.count, columns, a.dim);
    for (int64_t i = 0; i < lanes.columns; ++i) {
      w.maximum[i] = -__builtin_inff();
      w.sum[i] = 0.0f;
    }
    for (int64_t key = 0; key < lanes.most; key += kBlockKeys) {
      const int64_t count = smaller(kBlockKeys, lanes.most - key);
      const int64_t shared = larger(0, smaller(count, a.prefix_keys[first] - key));
      scores(mine, first, members, h, lanes, key, count, shared);
      if (key + count > lanes.fewest) hide(w.scores, key, count, lanes);
      add_block<Tile, T>(w.scores, count, lanes.vectors(), a.scale * kExponentUnit<T>, w.maximum, w.sum, w.rescale,
                         w.probabilities);
      add(mine, first, members, h, lanes, key, count, shared);
    }
    write_lanes<T>(common, lanes, w.output, padded, w.maximum, w.sum);
  }
};

// Returns the bytes of scratch memory that it needs; does nothing else when there is none.
template <typename Tile, typename T>
static int64_t decode(const DecodeAttention& a) {
  Scratch scratch{a.scratch};
  const Decode<Tile, T> work(scratch, a);
  const int64_t shared = scratch.used;
  Scratch one{a.scratch, shared};
  typename Decode<Tile, T>::Mine(one, work);
  const int64_t each = one.used - shared;
  if (!a.scratch) return shared + each * a.threads;

  const int64_t units = work.find_clusters() * a.kv_heads;
  const int team = units < a.threads ? static_cast<int>(larger(units, 1)) : a.threads;
#pragma omp parallel num_threads(team)
  {
    Scratch rest{a.scratch, shared + each * omp_get_thread_num()};
    const typename Decode<Tile, T>::Mine mine(rest, work);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t cluster = unit / a.kv_heads, first = work.clusters[cluster];
      work.run(first, work.clusters[cluster + 1] - first, unit % a.kv_heads, mine);
    }
  }
  return 0;
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
