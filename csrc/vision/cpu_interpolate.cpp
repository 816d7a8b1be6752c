// Bilinear interpolation of a learned square table of positions at the patches of images, added to the patches'
// embeddings; and the gradient of the table.
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "grid.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// The two rows of the table around a coordinate on one axis, and their weights, rounded where Hugging Face rounds: the
// coordinate is one float32 quotient, 1 - |distance| two differences.
struct Taps {
  int64_t low, high;
  float low_weight, high_weight;
};

M4OV_INLINE Taps taps(int64_t index, int64_t size, int64_t side) {
  const float x = static_cast<float>(index) * static_cast<float>(side - 1) / static_cast<float>(size > 1 ? size - 1 : 1);
  const int64_t low = static_cast<int64_t>(x);
  const float distance = x - static_cast<float>(low);
  const int64_t last = side - 1;  // past it only by rounding, and the last row's second tap, of weight 0
  return {low < last ? low : last, low < last ? low + 1 : last, 1.0f - distance, 1.0f - (1.0f - distance)};
}

constexpr int kNone = 0, kRoundedSum = 1, kOnce = 2;  // what is added to hidden_states, if there are any

template <typename T, int kAdd, bool kStream>
static void interpolate_row(T* output, const T* const (&rows)[4], const float (&weights)[4], const T* hidden,
                            int64_t columns) {
  const V w0 = set1(weights[0]), w1 = set1(weights[1]), w2 = set1(weights[2]), w3 = set1(weights[3]);
  const auto finish = [](Pair sum, Pair hidden) {
    if constexpr (kAdd == kNone) return sum;
    if constexpr (kAdd == kRoundedSum) return hidden + round_to<T>(sum);
    return hidden + sum;
  };
  int64_t i = 0;
  for (; i + kGroup <= columns; i += kGroup) {
    Pair sum = load(rows[0] + i) * both(w0) + load(rows[1] + i) * both(w1);
    sum = sum + load(rows[2] + i) * both(w2);
    sum = sum + load(rows[3] + i) * both(w3);
    Pair x = sum;
    if constexpr (kAdd != kNone) {
      prefetch(hidden + i + 2048 / static_cast<int64_t>(sizeof(T)));
      x = load(hidden + i);
    }
    put<kStream>(output + i, finish(sum, x));
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    Pair sum = load_tail(rows[0] + i, rest) * both(w0) + load_tail(rows[1] + i, rest) * both(w1);
    sum = sum + load_tail(rows[2] + i, rest) * both(w2);
    sum = sum + load_tail(rows[3] + i, rest) * both(w3);
    Pair x = sum;
    if constexpr (kAdd != kNone) x = load_tail(hidden + i, rest);
    store_tail(output + i, finish(sum, x), rest);
  }
}

template <typename T, int kAdd>
static void forward(const InterpolateFwd& a) {
  const int64_t bytes = a.patches * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = bytes >= kStreamBytes;
  parallel_ranges(a.patches, bytes, a.threads, [&](int64_t begin, int64_t end) {
    Patch patch = patch_at(a.grid_thw, a.images, a.merge_size, begin);
    for (int64_t n = begin; n < end; ++n, patch.next()) {
      const Taps y = taps(patch.row(), patch.h, a.side), x = taps(patch.column(), patch.w, a.side);
      const auto cell = [&](int64_t row, int64_t column) {
        return static_cast<const T*>(a.table) + (row * a.side + column) * a.columns;
      };
      const T* const rows[4] = {cell(y.low, x.low), cell(y.low, x.high), cell(y.high, x.low), cell(y.high, x.high)};
      const float weights[4] = {y.low_weight * x.low_weight, y.low_weight * x.high_weight,
                                y.high_weight * x.low_weight, y.high_weight * x.high_weight};
      T* output = static_cast<T*>(a.output) + n * a.columns;
      const T* hidden = kAdd == kNone ? nullptr : static_cast<const T*>(a.hidden_states) + n * a.hidden_stride;
      if (large && vector_aligned(output)) {
        interpolate_row<T, kAdd, true>(output, rows, weights, hidden, a.columns);
      } else {
        interpolate_row<T, kAdd, false>(output, rows, weights, hidden, a.columns);
      }
    }
    fence();
  });
}

// The gradient of one cell of the table is a weighted sum of rows of the output's gradient: those of the patches around
// it, image by image and in their order there. Nobody else writes it, so nothing depends on the number of threads.

// The first index on an axis of `size` patches whose lower tap is `low` or beyond.
M4OV_INLINE int64_t first_of(int64_t low, int64_t size, int64_t side) {
  if (low <= 0) return 0;
  if (low >= side || size == 1) return size;
  return (low * (size - 1) + side - 2) / (side - 1);
}

// How much patch `index` of an axis gives to `cell` of the table: as `taps` has it.
M4OV_INLINE float weight_of(int64_t index, int64_t size, int64_t side, int64_t cell) {
  const Taps t = taps(index, size, side);
  if (t.low == t.high) return cell == t.low ? t.low_weight + t.high_weight : 0.0f;  // the second one is 0
  return cell == t.low ? t.low_weight : cell == t.high ? t.high_weight : 0.0f;
}

template <typename T>
struct Term {
  const T* row;
  float weight;
};

constexpr int64_t kTerms = 128;
constexpr int64_t kPanel = 2048;                // columns whose sums a thread keeps at hand
constexpr int kSums = kLanes == 16 ? 8 : 4;     // pairs of vectors that are summed in registers

template <int kCount, typename T>
M4OV_INLINE void add_terms(float* sums, const Term<T>* terms, int64_t count, int64_t column) {
  Pair total[kCount];
  for (int k = 0; k < kCount; ++k) total[k] = load(sums + column + k * kGroup);
  for (int64_t n = 0; n < count; ++n) {
    const T* row = terms[n].row + column;
    const Pair weight = both(set1(terms[n].weight));
    for (int k = 0; k < kCount; ++k) total[k] = fma(load(row + k * kGroup), weight, total[k]);
  }
  for (int k = 0; k < kCount; ++k) store(sums + column + k * kGroup, total[k]);
}

// sums[0, columns) += the terms; the order of elements within a group is T's. Has room for whole groups.
template <typename T>
static void flush(float* sums, const Term<T>* terms, int64_t count, int64_t columns) {
  int64_t column = 0;
  for (; column + kSums * kGroup <= columns; column += kSums * kGroup) add_terms<kSums>(sums, terms, count, column);
  for (; column + kGroup <= columns; column += kGroup) add_terms<1>(sums, terms, count, column);
  if (column == columns) return;
  Pair total = load(sums + column);
  for (int64_t n = 0; n < count; ++n) {
    total = fma(load_tail(terms[n].row + column, columns - column), both(set1(terms[n].weight)), total);
  }
  store(sums + column, total);
}

template <typename T>
static void cell_gradient(const InterpolateBwd& a, int64_t cell, int64_t first, int64_t columns) {
  alignas(64) float sums[kPanel];
  Term<T> terms[kTerms];
  memset(sums, 0, static_cast<size_t>((columns + kGroup - 1) / kGroup * kGroup) * sizeof(float));
  const int64_t row = cell / a.side, column = cell % a.side, m = a.merge_size;
  const T* frame = static_cast<const T*>(a.grad_output) + first;
  int64_t count = 0;
  for (const int64_t* grid = a.grid_thw; grid < a.grid_thw + 3 * a.images; grid += 3) {
    const int64_t t = grid[0], h = grid[1], w = grid[2];
    const int64_t top = first_of(row - 1, h, a.side), bottom = first_of(row + 1, h, a.side);
    const int64_t left = first_of(column - 1, w, a.side), right = first_of(column + 1, w, a.side);
    for (int64_t f = 0; top < bottom && left < right && f < t; ++f) {
      for (int64_t i = top; i < bottom; ++i) {
        const float y = weight_of(i, h, a.side, row);
        const int64_t line = f * h * w + i / m * m * w + i % m * m;  // where the patches of row i begin in merge order
        for (int64_t j = left; j < right; ++j) {
          terms[count++] = {frame + (line + j / m * m * m + j % m) * a.grad_stride, y * weight_of(j, w, a.side, column)};
          if (count == kTerms) {
            flush(sums, terms, count, columns);
            count = 0;
          }
        }
      }
    }
    frame += t * h * w * a.grad_stride;
  }
  flush(sums, terms, count, columns);
  T* output = static_cast<T*>(a.grad_table) + cell * a.columns + first;
  int64_t i = 0;
  for (; i + kGroup <= columns; i += kGroup) store(output + i, load(sums + i));
  if (i < columns) store_tail(output + i, load(sums + i), columns - i);
}

template <typename T>
static void backward(const InterpolateBwd& a) {
  const int64_t bytes = a.patches * a.columns * static_cast<int64_t>(sizeof(T));
  parallel_ranges(a.side * a.side, bytes, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      for (int64_t first = 0; first < a.columns; first += kPanel) {
        cell_gradient<T>(a, cell, first, a.columns - first < kPanel ? a.columns - first : kPanel);
      }
    }
  });
}

}  // namespace

int64_t interpolate_fwd(const InterpolateFwd& a) {
  const int64_t found = misfit(a.grid_thw, a.images, a.patches, a.merge_size);
  if (found != kGridsFit) return found;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!a.hidden_states) {
      forward<T, kNone>(a);
    } else if (a.numerics == kHf) {
      forward<T, kRoundedSum>(a);
    } else {
      forward<T, kOnce>(a);
    }
  });
  return found;
}

int64_t interpolate_bwd(const InterpolateBwd& a) {
  const int64_t found = misfit(a.grid_thw, a.images, a.patches, a.merge_size);
  if (found == kGridsFit) with_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
  return found;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
