// Cross entropy over a chunk of the vocabulary: the passes over logits between the matrix products of head/chunked.py.
#include "../common/parallel.h"
#include "../common/simd.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// The sum of exponentials is taken by blocks of this many columns, merged in order: a row's bits do not depend on how
// the vocabulary is cut into chunks, if chunks are multiples of it. Fits the L1 cache, for the second pass.
constexpr int64_t kBlock = 512;

struct Running {
  float maximum, sum;
};

// Adds `sum` exponentials relative to `maximum`.
static Running merge(Running state, float maximum, float sum) {
  if (maximum > state.maximum) return {maximum, state.sum * __builtin_expf(state.maximum - maximum) + sum};
  if (sum == 0.0f) return state;
  return {state.maximum, state.sum + sum * __builtin_expf(maximum - state.maximum)};
}

// The exponential is precise to fp32 for every T: the loss is not rounded to T.
template <typename T, bool kTotal>
static Running add_block(Running state, const T* logits, int64_t count, float* total) {
  const int64_t whole = count / kGroup * kGroup, rest = count - whole;
  const Pair last = rest ? load_tail(logits + whole, rest, minus_infinity<T>()) : both(set1(-__builtin_inff()));
  V largest = max(last.a, last.b);
  for (int64_t i = 0; i < whole; i += kGroup) {
    const Pair x = load(logits + i);
    largest = max(max(x.a, x.b), largest);
  }
  const float maximum = lane_max(largest);
  // All -inf: nothing to add, unless max() lost a NaN, which the sum keeps.
  const float shift_value = maximum == -__builtin_inff() ? 0.0f : maximum;
  const Pair shift = both(set1(shift_value));
  Pair even = exp_for<float>(last - shift), odd = both(set1(0.0f));
  int64_t i = 0;
  for (; i + 2 * kGroup <= whole; i += 2 * kGroup) {
    even = even + exp_for<float>(load(logits + i) - shift);
    odd = odd + exp_for<float>(load(logits + i + kGroup) - shift);
  }
  if (i < whole) even = even + exp_for<float>(load(logits + i) - shift);
  if constexpr (kTotal) {
    Pair sum = rest ? load_tail(logits + whole, rest) : both(set1(0.0f));
    for (i = 0; i < whole; i += kGroup) sum = sum + load(logits + i);
    *total += lane_sum(sum);
  }
  return merge(state, maximum, lane_sum(even + odd));
}

template <typename T>
static float scalar(const T* p) {
  // Every other lane is zero.
  return lane_sum(load_tail(p, 1));
}

template <typename T, bool kTotal>
static void forward(const CrossEntropyFwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  parallel_ranges(a.rows, bytes, a.threads, [&](int64_t begin, int64_t end) {
    float *maxima = a.state, *sums = maxima + a.rows, *targets = sums + a.rows, *totals = targets + a.rows;
    for (int64_t row = begin; row < end; ++row) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
      Running state = {maxima[row], sums[row]};
      for (int64_t i = 0; i < a.columns; i += kBlock) {
        const int64_t count = a.columns - i < kBlock ? a.columns - i : kBlock;
        state = add_block<T, kTotal>(state, logits + i, count, totals + row);
      }
      maxima[row] = state.maximum;
      sums[row] = state.sum;
      const int64_t hit = a.target[row] - a.first;
      if (hit >= 0 && hit < a.columns) targets[row] = scalar(logits + hit);
    }
  });
}

template <typename T>
static void backward(const CrossEntropyBwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  parallel_ranges(a.rows, bytes, a.threads, [&](int64_t begin, int64_t end) {
    const Pair uniform = both(set1(a.uniform_weight));
    for (int64_t row = begin; row < end; ++row) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
      T* gradient = static_cast<T*>(a.gradient) + row * a.logits_stride;
      if (a.target[row] < 0) {
        memset(gradient, 0, a.columns * sizeof(T));
        continue;
      }
      // Two steps, x - maximum and then - log_sum: log p is small where p is large, and keeps its precision there.
      const float maximum_value = canonical(a.normalizer[2 * row]), log_sum_value = canonical(a.normalizer[2 * row + 1]);
      const float scale_value = canonical(a.grad_loss[row]);
      const Pair maximum = both(set1(maximum_value)), log_sum = both(set1(log_sum_value));
      const Pair scale = both(set1(scale_value));
      const int64_t hit = a.target[row] - a.first;
      const bool here = hit >= 0 && hit < a.columns;
      // The target's own gradient cancels, p - 1: it takes expm1.
      float at_target = 0.0f;
      if (here) {
        const float log_p = scalar(logits + hit) - maximum_value - log_sum_value;
        at_target = __builtin_expm1f(log_p) + (1.0f - a.target_weight - a.uniform_weight);
      }
      int64_t i = 0;
      for (; i + kGroup <= a.columns; i += kGroup) {
        store(gradient + i, (exp_for<T>(load(logits + i) - maximum - log_sum) - uniform) * scale);
      }
      if (i < a.columns) {
        const int64_t rest = a.columns - i;
        store_tail(gradient + i, (exp_for<T>(load_tail(logits + i, rest) - maximum - log_sum) - uniform) * scale, rest);
      }
      if (here) store_tail(gradient + hit, both(set1(at_target * scale_value)), 1);
    }
  });
}

template <typename T>
static void add(const Accumulate& a) {
  const int64_t groups = (a.count + kGroup - 1) / kGroup;
  parallel_ranges(groups, a.count * 4, a.threads, [&](int64_t begin, int64_t end) {
    const T* addend = static_cast<const T*>(a.addend);
    T* output = static_cast<T*>(a.output);
    for (int64_t i = begin * kGroup; i < end * kGroup; i += kGroup) {
      const int64_t rest = a.count - i;
      Pair sum = rest >= kGroup ? load(addend + i) : load_tail(addend + i, rest);
      if (!a.assign) sum = load(a.accumulator + i) + sum;
      if (!output) {
        store(a.accumulator + i, sum);
      } else if (rest >= kGroup) {
        store(output + i, sum);
      } else {
        store_tail(output + i, sum, rest);
      }
    }
  });
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyFwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.want_total ? forward<T, true>(a) : forward<T, false>(a);
  });
}

void cross_entropy_bwd(const CrossEntropyBwd& a) {
  with_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

void accumulate(const Accumulate& a) {
  with_dtype(a.dtype, [&](auto tag) { add<typename decltype(tag)::type>(a); });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
