// LayerNorm, with the addition of a residual before it: forward and backward.
#include "kernels.h"
#include "rows.h"

#define M4OV_ALWAYS __attribute__((always_inline))

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// ---- Forward: three passes over a row, the last two from the cache.

template <typename T, bool kResidual, bool kRounded>
struct Input {
  const T* x;
  const T* residual;
  static constexpr bool kSavedApart = kResidual && !kRounded;  // the backward sees the sum rounded

  template <bool kWhole>
  M4OV_ALWAYS Pair at(int64_t i, int64_t count) const {
    return add_residual<T, kResidual, kRounded>(load_group<kWhole>(x + i, count),
                                                kResidual ? load_group<kWhole>(residual + i, count) : Pair{});
  }
};

// The mean is center + shift: `center` is close to it, `shift` what a second pass finds missing. `saved_*`: of the row
// that the backward sees.
struct Moments {
  float center, shift, rstd, saved_mean, saved_rstd;
};

struct Deviation {
  float shift, rstd;
};
// In fp64, once a row. Where the squares overflow, the factor is 0 and the shift, which may have overflowed, unused.
static Deviation deviation(float sum, float squares, int64_t columns, double eps) {
  const double shift = squares <= 3.40282347e38f ? sum / static_cast<double>(columns) : 0.0;
  const double variance = squares / static_cast<double>(columns) - shift * shift;
  const double rstd = 1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps);
  return {static_cast<float>(shift), canonical(static_cast<float>(rstd))};
}

template <typename T>
M4OV_INLINE Pair ones(int64_t count) {  // and zeros after `count` lanes
  T buffer[kGroup];
  for (int i = 0; i < kGroup; ++i) buffer[i] = T{};
  for (int i = 0; i < count; ++i) buffer[i] = one<T>();
  return load(buffer);
}

// Two passes. The first cannot overflow, for it adds x/n; the second sums squares of distances from a value near the
// mean, so that nothing cancels however large the mean is, and corrects that value.
template <typename T, typename In>
static Moments moments(const In& input, int64_t columns, double eps) {
  const Pair share = both(set1(static_cast<float>(1.0 / static_cast<double>(columns))));
  float first[1], second[In::kSavedApart ? 4 : 2];
  sum_row<T>(columns, first, [&](auto whole, int64_t i, int64_t count, Pair* sums) M4OV_ALWAYS {
    sums[0] = fma(input.template at<whole.value>(i, count), share, sums[0]);
  });
  const Pair center = both(set1(first[0]));
  sum_row<T>(columns, second, [&](auto whole, int64_t i, int64_t count, Pair* sums) M4OV_ALWAYS {
    const auto add = [&](Pair x, Pair* to) M4OV_ALWAYS {
      Pair distance = x - center;
      if constexpr (!whole.value) distance = distance * ones<T>(count);
      to[0] = to[0] + distance;
      to[1] = fma(distance, distance, to[1]);
    };
    const Pair x = input.template at<whole.value>(i, count);
    add(x, sums);
    if constexpr (In::kSavedApart) add(round_to<T>(x), sums + 2);
  });
  const Deviation found = deviation(second[0], second[1], columns, eps);
  Deviation saved = found;
  if constexpr (In::kSavedApart) saved = deviation(second[2], second[3], columns, eps);
  return {first[0], found.shift, found.rstd, first[0] + saved.shift, saved.rstd};
}

template <typename T, bool kStream, bool kResidual, bool kRounded>
static void write_row(T* normed, T* new_residual, const Input<T, kResidual, kRounded>& input, const T* weight,
                      const T* bias, Moments row, int64_t columns, int64_t next_x, int64_t next_residual) {
  const Pair center = both(set1(row.center)), shift = both(set1(row.shift)), rstd = both(set1(row.rstd));
  each_group(columns, [&](auto whole, int64_t i, int64_t count) M4OV_ALWAYS {
    if constexpr (whole.value) {  // the row after the next is read while this one is written
      prefetch(input.x + next_x + i);
      if constexpr (kResidual) prefetch(input.residual + next_residual + i);
    }
    const Pair x = input.template at<whole.value>(i, count);
    if constexpr (kResidual) put_group<whole.value, kStream>(new_residual + i, x, count);
    const Pair scaled = ((x - center) - shift) * rstd;
    const Pair w = load_group<whole.value>(weight + i, count), b = load_group<whole.value>(bias + i, count);
    put_group<whole.value, kStream>(normed + i, fma(scaled, w, b), count);
  });
}

template <typename T, bool kResidual, bool kRounded>
static void forward(const LayerNormFwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = bytes >= kStreamBytes;
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  parallel_ranges(a.rows, bytes, a.threads, [&](int64_t begin, int64_t end) {
    const auto input = [&](int64_t row) {
      return Input<T, kResidual, kRounded>{
          static_cast<const T*>(a.hidden_states) + row * a.hidden_stride,
          kResidual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr};
    };
    const auto measure = [&](int64_t row) {
      const Moments found = moments<T>(input(row), a.columns, a.eps);
      a.mean[row] = found.saved_mean;
      a.rstd[row] = found.saved_rstd;
      return found;
    };
    // The next row's moments end in a chain of slow operations: they are found while this row is written.
    Moments current = measure(begin);
    for (int64_t row = begin; row < end; ++row) {
      const Moments next = row + 1 < end ? measure(row + 1) : Moments{};
      T* normed = static_cast<T*>(a.normed) + row * a.columns;
      T* new_residual = kResidual ? static_cast<T*>(a.new_residual) + row * a.columns : nullptr;
      if (large && vector_aligned(normed) && vector_aligned(new_residual)) {
        write_row<T, true>(normed, new_residual, input(row), weight, bias, current, a.columns, 2 * a.hidden_stride,
                           2 * a.residual_stride);
      } else {
        write_row<T, false>(normed, new_residual, input(row), weight, bias, current, a.columns, 2 * a.hidden_stride,
                            2 * a.residual_stride);
      }
      current = next;
    }
    if (large) fence();
  });
}

// ---- Backward. With x^ = (x - mean)·rstd and g = dy·w: dx = rstd·(g - mean(g) - x^·mean(g·x^)) + grad_residual,
// dw = sum over rows of dy·x^, db = sum over rows of dy.

constexpr int kRowBlock = 4;  // rows that share one load and store of the partial sums

template <typename T>
struct Row {
  const T* dy;
  const T* x;
  const T* grad_residual;
  T* dx;
  Pair mean, rstd, mean_grad, mean_product;
};

struct Distances {  // from a row to its successor in the next block, in elements
  int64_t dy, x, grad_residual;
};

template <typename T, int kRows, bool kParameters, bool kGradResidual, bool kStream>
static void write_rows(const Row<T>* rows, const T* weight, float* grad_weight, float* grad_bias, int64_t columns,
                       Distances next) {
  each_group(columns, [&](auto whole, int64_t i, int64_t count) M4OV_ALWAYS {
    const Pair w = load_group<whole.value>(weight + i, count);
    Pair dw, db;
    if constexpr (kParameters) {
      dw = load(grad_weight + i);
      db = load(grad_bias + i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Row<T>& row = rows[r];
      if constexpr (whole.value) {  // the next block of rows is read while this one is written
        prefetch<true>(row.dy + next.dy + i);
        prefetch<true>(row.x + next.x + i);
        if constexpr (kGradResidual) prefetch<true>(row.grad_residual + next.grad_residual + i);
      }
      const Pair dy = load_group<whole.value>(row.dy + i, count);
      const Pair normed = (load_group<whole.value>(row.x + i, count) - row.mean) * row.rstd;
      Pair dx = row.rstd * (dy * w - row.mean_grad - normed * row.mean_product);
      if constexpr (kGradResidual) dx = dx + load_group<whole.value>(row.grad_residual + i, count);
      put_group<whole.value, kStream>(row.dx + i, dx, count);
      if constexpr (kParameters) {
        dw = fma(dy, normed, dw);
        db = db + dy;
      }
    }
    if constexpr (kParameters) {
      store(grad_weight + i, dw);
      store(grad_bias + i, db);
    }
  });
}

template <typename T, int kRows, bool kParameters, bool kGradResidual>
static void backward_rows(const LayerNormBwd& a, int64_t first, float* grad_weight, float* grad_bias, bool large) {
  Row<T> rows[kRows];
  const T* weight = static_cast<const T*>(a.weight);
  bool aligned = true;
  for (int r = 0; r < kRows; ++r) {
    const int64_t index = first + r;
    Row<T>& row = rows[r];
    row.dy = static_cast<const T*>(a.grad_normed) + index * a.grad_stride;
    row.x = static_cast<const T*>(a.hidden_states) + index * a.hidden_stride;
    row.grad_residual =
        kGradResidual ? static_cast<const T*>(a.grad_residual) + index * a.grad_residual_stride : nullptr;
    row.dx = static_cast<T*>(a.grad_hidden_states) + index * a.columns;
    const float rstd = canonical(a.rstd[index]);
    const Pair mean = row.mean = both(set1(canonical(a.mean[index])));
    row.rstd = both(set1(rstd));
    float sums[2];
    sum_row<T>(a.columns, sums, [&](auto whole, int64_t i, int64_t count, Pair* to) M4OV_ALWAYS {
      const Pair grad = load_group<whole.value>(row.dy + i, count) * load_group<whole.value>(weight + i, count);
      to[0] = to[0] + grad;
      to[1] = fma(grad, load_group<whole.value>(row.x + i, count) - mean, to[1]);
    });
    const float width = static_cast<float>(a.columns);
    row.mean_grad = both(set1(sums[0] / width));
    row.mean_product = both(set1(sums[1] * rstd / width));
    aligned = aligned && vector_aligned(row.dx);
  }
  const Distances next = {kRows * a.grad_stride, kRows * a.hidden_stride, kRows * a.grad_residual_stride};
  if (large && aligned) {
    write_rows<T, kRows, kParameters, kGradResidual, true>(rows, weight, grad_weight, grad_bias, a.columns, next);
  } else {
    write_rows<T, kRows, kParameters, kGradResidual, false>(rows, weight, grad_weight, grad_bias, a.columns, next);
  }
}

template <typename T, bool kParameters, bool kGradResidual>
static void backward(const LayerNormBwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const int64_t length = padded(a.columns);
  const bool large = bytes >= kStreamBytes;
  parallel_ranges(a.blocks, bytes, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* grad_weight = kParameters ? a.partials + 2 * block * length : nullptr;
      float* grad_bias = kParameters ? grad_weight + length : nullptr;
      if (kParameters) memset(grad_weight, 0, 2 * length * sizeof(float));
      int64_t row = a.rows * block / a.blocks;
      const int64_t last = a.rows * (block + 1) / a.blocks;
      for (; row + kRowBlock <= last; row += kRowBlock) {
        backward_rows<T, kRowBlock, kParameters, kGradResidual>(a, row, grad_weight, grad_bias, large);
      }
      for (; row < last; ++row) backward_rows<T, 1, kParameters, kGradResidual>(a, row, grad_weight, grad_bias, large);
    }
    if (large) fence();
  });
  if (a.grad_weight) sum_partials<T>(a.grad_weight, a.partials, a.blocks, 2 * length, a.columns, a.threads);
  if (a.grad_bias) sum_partials<T>(a.grad_bias, a.partials + length, a.blocks, 2 * length, a.columns, a.threads);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!a.residual) return forward<T, false, false>(a);
    return a.numerics == kFp32 ? forward<T, true, false>(a) : forward<T, true, true>(a);
  });
}

void layer_norm_bwd(const LayerNormBwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool parameters = a.grad_weight || a.grad_bias;
    if (a.grad_residual) return parameters ? backward<T, true, true>(a) : backward<T, false, true>(a);
    return parameters ? backward<T, true, false>(a) : backward<T, false, false>(a);
  });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
