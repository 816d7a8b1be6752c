// RMSNorm, with the addition of a residual before it: forward and backward.
#include "kernels.h"
#include "rms_norm_row.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// ---- Forward

template <typename T, int kNumerics, bool kResidual>
static void forward(const RmsNormFwd& a) {
  constexpr bool kRounded = kNumerics != kFp32;
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = bytes >= kStreamBytes;
  parallel_ranges(a.rows, bytes, a.threads, [&](int64_t begin, int64_t end) {
    const auto input = [&](int64_t row) { return static_cast<const T*>(a.hidden_states) + row * a.hidden_stride; };
    const auto added = [&](int64_t row) {
      return kResidual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
    };
    const auto factor = [&](int64_t row) {
      const float squares = square_sum<T, kResidual, kRounded>(input(row), added(row), a.columns);
      return a.rstd[row] = reciprocal_root(squares, a.columns, a.eps);
    };
    // The next row's factor is a chain of slow operations: it is found while this row is written.
    float rstd = factor(begin);
    for (int64_t row = begin; row < end; ++row) {
      const float next = row + 1 < end ? factor(row + 1) : 0.0f;
      const T *x = input(row), *residual = added(row), *weight = static_cast<const T*>(a.weight);
      T* normed = static_cast<T*>(a.normed) + row * a.columns;
      T* new_residual = kResidual ? static_cast<T*>(a.new_residual) + row * a.columns : nullptr;
      if (large && vector_aligned(normed) && vector_aligned(new_residual)) {
        write_row<T, kNumerics, kResidual, true>(normed, new_residual, x, residual, weight, rstd, a.columns,
                                                 2 * a.hidden_stride, 2 * a.residual_stride);
      } else {
        write_row<T, kNumerics, kResidual, false>(normed, new_residual, x, residual, weight, rstd, a.columns,
                                                  2 * a.hidden_stride, 2 * a.residual_stride);
      }
      rstd = next;
    }
    if (large) fence();
  });
}

template <typename T, int kNumerics>
static void forward(const RmsNormFwd& a) {
  a.residual ? forward<T, kNumerics, true>(a) : forward<T, kNumerics, false>(a);
}

// ---- Backward. With x^ = x·rstd: dx = rstd·(dy·w - x^·mean(dy·w·x^)) + grad_residual, dw = sum over rows of dy·x^.

constexpr int kRowBlock = 4;  // rows that share one load and store of the weight gradient's partial sum

template <typename T>
struct Row {
  const T* dy;
  const T* x;
  const T* grad_residual;
  T* dx;
  Pair rstd, mean;
};

template <typename T>
static float mean_product(const T* dy, const T* x, const T* weight, float rstd, int64_t columns) {
  const Pair zero = both(set1(0.0f));
  Pair even = zero, odd = zero, runs = zero;
  int64_t i = 0;
  for (int64_t left = columns / (2 * kGroup); left > 0; left -= kRun<T>) {
    for (int64_t step = left < kRun<T> ? left : kRun<T>; step > 0; --step, i += 2 * kGroup) {
      even = fma(load(dy + i) * load(weight + i), load(x + i), even);
      odd = fma(load(dy + i + kGroup) * load(weight + i + kGroup), load(x + i + kGroup), odd);
    }
    runs = runs + (even + odd);
    even = odd = zero;
  }
  for (; i + kGroup <= columns; i += kGroup) even = fma(load(dy + i) * load(weight + i), load(x + i), even);
  if (i < columns) {
    const int64_t rest = columns - i;
    odd = fma(load_tail(dy + i, rest) * load_tail(weight + i, rest), load_tail(x + i, rest), odd);
  }
  return lane_sum(runs + (even + odd)) * rstd / static_cast<float>(columns);
}

struct Distances {  // from a row to its successor in the next block, in elements
  int64_t dy, x, grad_residual;
};

template <bool kGradResidual>
M4OV_INLINE Pair input_gradient(Pair dy, Pair normed, Pair weight, Pair grad_residual, Pair rstd, Pair mean) {
  const Pair grad = rstd * (dy * weight - normed * mean);
  return kGradResidual ? grad + grad_residual : grad;
}

template <typename T, int kRows, bool kWeight, bool kGradResidual, bool kStream>
static void write_rows(const Row<T>* rows, const T* weight, float* partial, int64_t columns, Distances next) {
  int64_t i = 0;
  for (; i + kGroup <= columns; i += kGroup) {
    const Pair w = load(weight + i);
    Pair dw;
    if constexpr (kWeight) dw = load(partial + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      // The next block of rows is read while this one is written; it is more than L1 holds.
      prefetch<true>(rows[r].dy + next.dy + i);
      prefetch<true>(rows[r].x + next.x + i);
      if constexpr (kGradResidual) prefetch<true>(rows[r].grad_residual + next.grad_residual + i);
      const Pair dy = load(rows[r].dy + i), normed = load(rows[r].x + i) * rows[r].rstd;
      const Pair extra = kGradResidual ? load(rows[r].grad_residual + i) : Pair{};
      put<kStream>(rows[r].dx + i, input_gradient<kGradResidual>(dy, normed, w, extra, rows[r].rstd, rows[r].mean));
      if constexpr (kWeight) dw = fma(dy, normed, dw);
    }
    if constexpr (kWeight) store(partial + i, dw);
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    const Pair w = load_tail(weight + i, rest);
    Pair dw;
    if constexpr (kWeight) dw = load(partial + i);
    for (int r = 0; r < kRows; ++r) {
      const Pair dy = load_tail(rows[r].dy + i, rest), normed = load_tail(rows[r].x + i, rest) * rows[r].rstd;
      const Pair extra = kGradResidual ? load_tail(rows[r].grad_residual + i, rest) : Pair{};
      store_tail(rows[r].dx + i, input_gradient<kGradResidual>(dy, normed, w, extra, rows[r].rstd, rows[r].mean), rest);
      if constexpr (kWeight) dw = fma(dy, normed, dw);
    }
    if constexpr (kWeight) store(partial + i, dw);
  }
}

template <typename T, int kRows, bool kWeight, bool kGradResidual>
static void backward_rows(const RmsNormBwd& a, int64_t first, float* partial, bool large) {
  Row<T> rows[kRows];
  const T* weight = static_cast<const T*>(a.weight);
  bool aligned = true;
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    rows[r].dy = static_cast<const T*>(a.grad_normed) + row * a.grad_stride;
    rows[r].x = static_cast<const T*>(a.hidden_states) + row * a.hidden_stride;
    rows[r].grad_residual =
        kGradResidual ? static_cast<const T*>(a.grad_residual) + row * a.grad_residual_stride : nullptr;
    rows[r].dx = static_cast<T*>(a.grad_hidden_states) + row * a.columns;
    const float rstd = canonical(a.rstd[row]);
    rows[r].rstd = both(set1(rstd));
    rows[r].mean = both(set1(mean_product(rows[r].dy, rows[r].x, weight, rstd, a.columns)));
    aligned = aligned && vector_aligned(rows[r].dx);
  }
  const Distances next = {kRows * a.grad_stride, kRows * a.hidden_stride, kRows * a.grad_residual_stride};
  if (large && aligned) {
    write_rows<T, kRows, kWeight, kGradResidual, true>(rows, weight, partial, a.columns, next);
  } else {
    write_rows<T, kRows, kWeight, kGradResidual, false>(rows, weight, partial, a.columns, next);
  }
}

template <typename T, bool kWeight, bool kGradResidual>
static void backward(const RmsNormBwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const int64_t length = padded(a.columns);
  const bool large = bytes >= kStreamBytes;
  parallel_ranges(a.blocks, bytes, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* partial = kWeight ? a.partials + block * length : nullptr;
      if (kWeight) memset(partial, 0, length * sizeof(float));
      int64_t row = a.rows * block / a.blocks;
      const int64_t last = a.rows * (block + 1) / a.blocks;
      for (; row + kRowBlock <= last; row += kRowBlock) {
        backward_rows<T, kRowBlock, kWeight, kGradResidual>(a, row, partial, large);
      }
      for (; row < last; ++row) backward_rows<T, 1, kWeight, kGradResidual>(a, row, partial, large);
    }
    if (large) fence();
  });
  if (!kWeight) return;
  sum_partials<T>(a.grad_weight, a.partials, a.blocks, length, a.columns, a.threads);
}

template <typename T, bool kWeight>
static void backward(const RmsNormBwd& a) {
  a.grad_residual ? backward<T, kWeight, true>(a) : backward<T, kWeight, false>(a);
}

}  // namespace

void rms_norm_fwd(const RmsNormFwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (a.numerics) {
      case kHf:
        return forward<T, kHf>(a);
      case kVllm:
        return forward<T, kVllm>(a);
      default:
        return forward<T, kFp32>(a);
    }
  });
}

void rms_norm_bwd(const RmsNormBwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.grad_weight ? backward<T, true>(a) : backward<T, false>(a);
  });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
