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

// The gradient of one row of the table, some columns of it, is gathered from the rows of patches around it: those of one
// image after the other, first summed down (over its rows and frames), then along. Nobody else writes it, and the order
// of the sums does not depend on who does it, so neither do the bits on the number of threads.

// The first index on an axis of `size` patches whose lower tap is `low` or beyond.
M4OV_INLINE int64_t first_of(int64_t low, int64_t size, int64_t side) {
  if (low <= 0) return 0;
  if (low >= side || size == 1) return size;
  return (low * (size - 1) + side - 2) / (side - 1);
}

// How much patch `index` of an axis gives to `cell` of the table: as `taps` has it.
M4OV_INLINE float weight_of(int64_t index, int64_t size, int64_t side, int64_t cell) {
  const Taps t = taps(index, size, side);
  return cell == t.low ? t.low_weight : cell == t.high ? t.high_weight : 0.0f;  // the last one's second weight is 0
}

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// A row of patches that counts: where it begins, in patches, and how much.
struct Line {
  int64_t begin;
  float weight;
};

constexpr int kLines = 4;  // of one image, summed at once

// sums[cell] += what the lines give to it, over all patches of their image's width. What a load has in one lane is in
// that lane of every sum: their order is T's own until they are stored.
template <int kCount, typename T>
static void add_lines(float* sums, const Line (&lines)[kLines], const T* image, int64_t stride, int64_t w, int64_t side,
                      int64_t m, int64_t columns, int64_t pitch) {
  Pair weights[kCount];
  for (int n = 0; n < kCount; ++n) weights[n] = both(set1(lines[n].weight));
  const int64_t next = m * m * stride;  // the same place in the next block
  for (int64_t block = 0; block < w; block += m) {
    for (int64_t j = 0; j < m; ++j) {
      const Taps t = taps(block + j, w, side);
      const Pair low_weight = both(set1(t.low_weight)), high_weight = both(set1(t.high_weight));
      float* low = sums + t.low * pitch;
      float* high = low + pitch;  // behind the table's last place: of weight 0, and there is room for it
      const T* rows[kCount];
      for (int n = 0; n < kCount; ++n) rows[n] = image + (lines[n].begin + block * m + j) * stride;
      const auto add = [&](int64_t i, const Pair (&x)[kCount]) {
        Pair down = x[0] * weights[0];
        for (int n = 1; n < kCount; ++n) down = fma(x[n], weights[n], down);
        store(low + i, fma(down, low_weight, load(low + i)));
        store(high + i, fma(down, high_weight, load(high + i)));
      };
      Pair x[kCount];
      int64_t i = 0;
      for (; i + kGroup <= columns; i += kGroup) {
        for (int n = 0; n < kCount; ++n) {
          prefetch<true>(rows[n] + next + i);  // not to L1, which the sums fill
          x[n] = load(rows[n] + i);
        }
        add(i, x);
      }
      if (i < columns) {
        for (int n = 0; n < kCount; ++n) x[n] = load_tail(rows[n] + i, columns - i);
        add(i, x);
      }
    }
  }
}

template <typename T>
static void row_gradient(const InterpolateBwd& a, float* sums, int64_t row, int64_t column, int64_t columns) {
  const int64_t pitch = (columns + kGroup - 1) / kGroup * kGroup, m = a.merge_size;
  memset(sums, 0, static_cast<size_t>((a.side + 1) * pitch) * sizeof(float));
  const T* image = static_cast<const T*>(a.grad_output) + column;
  for (const int64_t* grid = a.grid_thw; grid < a.grid_thw + 3 * a.images; grid += 3) {
    const int64_t t = grid[0], h = grid[1], w = grid[2];
    const int64_t top = first_of(row - 1, h, a.side), bottom = first_of(row + 1, h, a.side);
    Line lines[kLines];
    int count = 0;
    const auto flush = [&](auto number) {
      add_lines<decltype(number)::value, T>(sums, lines, image, a.grad_stride, w, a.side, m, columns, pitch);
      count = 0;
    };
    for (int64_t f = 0; f < t; ++f) {
      for (int64_t i = top; i < bottom; ++i) {
        // In merge order a row's patches lie m by m, a block of m · m apart.
        lines[count++] = {f * h * w + i / m * m * w + i % m * m, weight_of(i, h, a.side, row)};
        if (count == kLines) flush(Number<kLines>{});
      }
    }
    if (count == 1) flush(Number<1>{});
    if (count == 2) flush(Number<2>{});
    if (count == 3) flush(Number<3>{});
    image += t * h * w * a.grad_stride;
  }
  T* output = static_cast<T*>(a.grad_table) + row * a.side * a.columns + column;
  for (int64_t cell = 0; cell < a.side; ++cell, output += a.columns, sums += pitch) {
    int64_t i = 0;
    for (; i + kGroup <= columns; i += kGroup) store(output + i, load(sums + i));
    if (i < columns) store_tail(output + i, load(sums + i), columns - i);
  }
}

template <typename T>
static void backward(const InterpolateBwd& a) {
  const int64_t bytes = a.patches * a.columns * static_cast<int64_t>(sizeof(T));
  // Whole rows as far as they go: the hardware's prefetchers follow rows, and lose a thread that reads parts of them.
  const int64_t panels = (a.columns + kSumsColumns - 1) / kSumsColumns;
  const int64_t panel = ((a.columns + panels - 1) / panels + kGroup - 1) / kGroup * kGroup, units = panels * a.side;
  parallel_ranges(a.threads, bytes, a.threads, [&](int64_t first, int64_t last) {
    for (int64_t id = first; id < last; ++id) {
      float* sums = a.sums + id * (a.side + 1) * a.sums_columns;
      for (int64_t unit = units * id / a.threads; unit < units * (id + 1) / a.threads; ++unit) {
        const int64_t column = unit / a.side * panel, left = a.columns - column;
        row_gradient<T>(a, sums, unit % a.side, column, left < panel ? left : panel);
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
