// What forward and backward share: sequences, lanes, scratch memory, and the operands laid out once for all blocks.
//
// A lane is a pair of a query row and one of the query heads that share a key head: lane = row · group + head in group.
// Scores are computed transposed, keys by lanes, so that maxima, sums and rescaling stay within a lane, and one pass
// over keys and values serves the whole group. Keys are taken in blocks that start at the sequence's first key: what a
// lane adds up, and in which order, depends on nothing but its own query and the keys it sees.
#pragma once

#include "../common/pack.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kBlockLanes = 64;
constexpr int64_t kBlockKeys = 128;

struct Sequence {
  int64_t first_row, rows;
  int64_t first_key, keys;  // key i is token first_key + i, if it is not in the prefix
  int64_t prefix_first, prefix_keys;

  // Where key i lies, and how many of `count` from there on lie behind it.
  int64_t token(int64_t key) const { return (key < prefix_keys ? prefix_first : first_key) + key; }
  int64_t together(int64_t key, int64_t count) const {
    return key < prefix_keys ? smaller(count, prefix_keys - key) : count;
  }

  // How many keys the query row sees; rows are aligned to the end of the keys.
  int64_t visible(bool causal, int64_t row) const {
    return causal ? larger(0, smaller(keys, row + 1 + keys - rows)) : keys;
  }
};

M4OV_INLINE Sequence sequence_at(const VarlenAttention& a, int64_t n) {
  return {a.bounds_q[n], a.bounds_q[n + 1] - a.bounds_q[n], a.bounds_k[n], a.bounds_k[n + 1] - a.bounds_k[n], 0, 0};
}

// The last n with starts[n] <= unit.
M4OV_INLINE int64_t owner(const int64_t* starts, int64_t sequences, int64_t unit) {
  int64_t low = 0, high = sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (starts[middle] <= unit ? low : high) = middle;
  }
  return low;
}

// Rows of which the first `split` lie from `rows` on, and row i of the others at rest + i · stride.
template <typename E>
struct Block {
  const E* rows;
  int64_t stride, split;
  const E* rest;

  const E* at(int64_t i) const { return (i < split ? rows : rest) + i * stride; }
};

// Rows that are needed soon. They lie apart, a head of every token, where the processor does not foresee them.
struct Ahead {
  const char* rows;
  int64_t stride, bytes, count;

  void fetch(int64_t first, int64_t last) const {
    for (int64_t i = first; i < smaller(last, count); ++i) {
      for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(rows + i * stride + at, _MM_HINT_T0);
    }
  }
};

// Keys or values as left operands: [key][dim], where they lie or, for a tile of another element, converted.
template <typename Tile, typename T>
struct Rows {
  using E = typename Tile::Element;
  static constexpr bool kConverted = !kSame<E, T>;
  E* converted;  // [kv_heads][tokens][dim]
  const T* original;
  int64_t row, head, tokens, dim;

  Rows(Scratch& scratch, const void* x, int64_t row, int64_t head, const VarlenAttention& a)
      : converted(kConverted ? scratch.take<E>(a.kv_heads * a.tokens_k * a.dim) : nullptr),
        original(static_cast<const T*>(x)), row(row), head(head), tokens(a.tokens_k), dim(a.dim) {}

  int64_t stride() const { return kConverted ? dim : row; }
  Ahead ahead(int64_t h, const Sequence& s, int64_t key, int64_t count) const {
    constexpr int64_t kSize = sizeof(T);
    const char* rows = reinterpret_cast<const char*>(original + h * head + s.token(key) * row);
    return {rows, row * kSize, dim * kSize, s.together(key, count)};
  }
  const E* at(int64_t h, int64_t key) const {
    if constexpr (kConverted) {
      return converted + (h * tokens + key) * dim;
    } else {
      return original + h * head + key * row;
    }
  }
  // A few rows of a sequence, from its key `key` on: where they lie, or in `buffer`, `width` elements to a row, zeros
  // beyond the head's.
  Block<E> block(E* buffer, int64_t width, int64_t h, const Sequence& s, int64_t key, int64_t count) const {
    const int64_t inside = s.together(key, count);
    if constexpr (!kConverted) {
      if (width == dim) {
        const T* of_head = original + h * head;
        return {of_head + s.token(key) * row, row, inside, of_head + (s.first_key + key) * row};
      }
    }
    copy(buffer, width, h, s.token(key), inside);
    if (inside < count) copy(buffer + inside * width, width, h, s.token(key + inside), count - inside);
    return {buffer, width, count, buffer};
  }
  void copy(E* buffer, int64_t width, int64_t h, int64_t first, int64_t count) const {
    const T* from = original + h * head + first * row;
    for (int64_t i = 0; i < count; ++i) {
      E* to = buffer + i * width;
      if constexpr (kConverted) {
        widen(to, from + i * row, dim);
      } else {
        memcpy(to, from + i * row, dim * sizeof(E));
      }
      memset(to + dim, 0, (width - dim) * sizeof(E));
    }
  }
  void convert(int64_t h, int64_t key, int64_t count) const {
    if constexpr (kConverted) {
      for (int64_t i = key; i < key + count; ++i) {
        widen(converted + (h * tokens + i) * dim, original + h * head + i * row, dim);
      }
    }
  }
};

// Products of rows with lanes over the head's dimension: [rows][kBlockLanes] of A [rows][dim] and B [dim / kPair][lane].
// An fp32 sum over a whole head in one go loses more than PyTorch's does: parts are summed by themselves, then added.
constexpr int64_t kPart = 32;
template <typename Tile, typename T>
static void multiply_rows(float* c, const typename Tile::Element* a, int64_t lda, const typename Tile::Element* b,
                          int64_t rows, int64_t vectors, int64_t dim) {
  constexpr int64_t kPair = Tile::kPair, kStep = kBlockLanes * kPair;
  const int64_t part = kSame<T, float> ? kPart : dim;
  multiply<Tile, kZero>(c, kBlockLanes, a, lda, b, kStep, rows, vectors, smaller(part, dim) / kPair);
  for (int64_t k = part; k < dim; k += part) {
    const int64_t steps = smaller(part, dim - k) / kPair;
    multiply<Tile, kKeep>(c, kBlockLanes, a + k, lda, b + k / kPair * kStep, kStep, rows, vectors, steps);
  }
}

// Keys or values as left operands of the second product: [dim][key], a panel for every block of keys.
template <typename Tile>
struct Panels {
  using E = typename Tile::Element;
  E* panels;
  int64_t tokens, dim;

  Panels(Scratch& scratch, const VarlenAttention& a)
      : tokens(a.tokens_k + Tile::kPair * (a.sequences + 1)), dim(a.dim) {
    panels = scratch.take<E>(a.kv_heads * tokens * dim);
  }

  // Sequences begin at multiples of kPair; the sequence's number makes room for the ones before it, rounded up.
  E* at(int64_t h, int64_t n, const Sequence& s, int64_t key) const {
    const int64_t first = Tile::kPair == 1 ? s.first_key : rounded_up(s.first_key + n, 2);
    return panels + (h * tokens + first + key) * dim;
  }
  // Distance of the rows of the panel that begins at `key`.
  static int64_t stride(const Sequence& s, int64_t key) {
    return rounded_up(smaller(kBlockKeys, s.keys - key), Tile::kPair);
  }
  void pack(int64_t h, int64_t n, const Sequence& s, int64_t key, const E* rows, int64_t row_stride) const {
    const int64_t count = smaller(kBlockKeys, s.keys - key), columns = stride(s, key);
    pack_transposed<Tile>(at(h, n, s, key), columns, rows, row_stride, count, columns, dim);
  }
};

// starts[n]: the number of the first unit of sequence n, where sequence n has count(sequence) of them.
template <typename Count>
static void number_units(int64_t* starts, const VarlenAttention& a, const Count& count) {
  starts[0] = 0;
  for (int64_t n = 0; n < a.sequences; ++n) starts[n + 1] = starts[n] + count(sequence_at(a, n));
}

// Enough threads for the work, about one for every 100 µs of one core's.
M4OV_INLINE int team_size(const VarlenAttention& a) {
  double products = 0;
  for (int64_t n = 0; n < a.sequences; ++n) {
    const Sequence s = sequence_at(a, n);
    products += static_cast<double>(s.rows) * static_cast<double>(s.keys + 8);
  }
  products *= static_cast<double>(a.heads * a.dim);
  const double wanted = 1 + products / (1 << 20);
  return wanted < a.threads ? static_cast<int>(wanted) : a.threads;
}

// The lanes of one block: where their rows are, and how many keys each sees.
struct Lanes {
  int64_t count, columns;              // in the block; rounded up to whole vectors
  int64_t fewest, most;                // keys that a lane of the block sees
  int32_t limit[kBlockLanes];          // keys that the lane sees; 0 for a lane that is not there
  int64_t token[kBlockLanes], head[kBlockLanes];

  Lanes() = default;
  Lanes(const VarlenAttention& a, const Sequence& s, int64_t h, int64_t block) {
    const int64_t group = a.heads / a.kv_heads, first = block * kBlockLanes;
    count = smaller(kBlockLanes, s.rows * group - first);
    columns = rounded_up(count, kLanes);
    fewest = s.visible(a.causal, first / group);
    most = s.visible(a.causal, (first + count - 1) / group);
    int64_t row = first / group, inside = first % group;  // divided once: a block of decoding has little else to do
    for (int64_t i = 0; i < columns; ++i) {
      limit[i] = i < count ? static_cast<int32_t>(s.visible(a.causal, row)) : 0;
      token[i] = s.first_row + row;
      head[i] = h * group + inside;
      if (++inside == group) inside = 0, ++row;
    }
  }
  int64_t vectors() const { return columns / kLanes; }
};

M4OV_INLINE int64_t lane_blocks(const VarlenAttention& a, const Sequence& s) {
  return (s.rows * (a.heads / a.kv_heads) + kBlockLanes - 1) / kBlockLanes;
}

// The lanes' rows of a tensor [token, head, dim] as the tile's elements: in place, or converted into `buffer`.
template <typename E, typename T>
static void lane_rows(const E** rows, E* buffer, const T* x, int64_t row, int64_t head, const Lanes& lanes,
                      int64_t dim) {
  for (int64_t i = 0; i < lanes.count; ++i) {
    const T* from = x + lanes.token[i] * row + lanes.head[i] * head;
    if constexpr (kSame<E, T>) {
      rows[i] = from;
    } else {
      widen(buffer + i * dim, from, dim);
      rows[i] = buffer + i * dim;
    }
  }
}

// 2^x for 16-bit results, e^x for fp32; kExponentUnit turns exponents of e into those of this power.
template <typename T>
constexpr float kExponentUnit = kSame<T, float> ? 1.0f : 1.44269504f;
template <typename T>
M4OV_INLINE V power(V x) {
  if constexpr (kSame<T, float>) {
    return exp_full(x);
  } else {
    return exp2_fast(x);
  }
}

// score · factor + back, with the product rounded as it was where `back` comes from: fused, the exponent of the largest
// score would not be 0 but that product's rounding, which of a large score is a large number.
M4OV_INLINE V exponent(V score, V factor, V back) { return score * factor + back; }

// Scores [keys][kBlockLanes] of keys that a lane does not see become -inf.
static void hide(float* scores, int64_t first_key, int64_t keys, const Lanes& lanes) {
  for (int64_t key = larger(0, lanes.fewest - first_key); key < keys; ++key) {
    float* row = scores + key * kBlockLanes;
    const int32_t position = static_cast<int32_t>(first_key + key);
    for (int64_t i = 0; i < lanes.columns; ++i) row[i] = position < lanes.limit[i] ? row[i] : -__builtin_inff();
  }
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
