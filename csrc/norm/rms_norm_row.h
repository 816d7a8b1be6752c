// One row of RMSNorm's forward: what the norm itself and its fusion with a quantisation share.
#pragma once

#include "rows.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// Two passes over a row, the second from the cache.

// Once a row in fp64: one rounding instead of four, in a factor that all elements share.
static float reciprocal_root(float square_sum, int64_t columns, double eps) {
  return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(square_sum) / static_cast<double>(columns) + eps));
}

template <typename T, bool kResidual, bool kRounded>
static float square_sum(const T* x, const T* residual, int64_t columns) {
  const auto at = [&](int64_t i) {
    return add_residual<T, kResidual, kRounded>(load(x + i), kResidual ? load(residual + i) : Pair{});
  };
  const Pair zero = both(set1(0.0f));
  Pair even = zero, odd = zero, runs = zero;
  int64_t i = 0;
  for (int64_t left = columns / (2 * kGroup); left > 0; left -= kRun<T>) {
    for (int64_t step = left < kRun<T> ? left : kRun<T>; step > 0; --step, i += 2 * kGroup) {
      const Pair first = at(i), second = at(i + kGroup);
      even = fma(first, first, even);
      odd = fma(second, second, odd);
    }
    runs = runs + (even + odd);
    even = odd = zero;
  }
  for (; i + kGroup <= columns; i += kGroup) {
    const Pair first = at(i);
    even = fma(first, first, even);
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    const Pair last = add_residual<T, kResidual, kRounded>(load_tail(x + i, rest),
                                                           kResidual ? load_tail(residual + i, rest) : Pair{});
    odd = fma(last, last, odd);
  }
  return lane_sum(runs + (even + odd));
}

template <typename T, bool kRoundTwice>
M4OV_INLINE Pair scaled(Pair x, Pair weight, Pair rstd) {
  const Pair normed = x * rstd;
  return (kRoundTwice ? round_to<T>(normed) : normed) * weight;
}

// kStream: the sum past the caches; kStreamNormed: the result too.
template <typename T, int kNumerics, bool kResidual, bool kStream, bool kStreamNormed = kStream>
static void write_row(T* normed, T* new_residual, const T* x, const T* residual, const T* weight, float rstd_value,
                      int64_t columns, int64_t next_x, int64_t next_residual) {
  constexpr bool kRounded = kNumerics != kFp32;
  const Pair rstd = both(set1(rstd_value));
  int64_t i = 0;
  for (; i + kGroup <= columns; i += kGroup) {
    // The row after the next is read while this one is written.
    prefetch(x + next_x + i);
    if constexpr (kResidual) prefetch(residual + next_residual + i);
    const Pair sum = add_residual<T, kResidual, kRounded>(load(x + i), kResidual ? load(residual + i) : Pair{});
    if constexpr (kResidual) put<kStream>(new_residual + i, sum);
    put<kStreamNormed>(normed + i, scaled<T, kNumerics == kHf>(sum, load(weight + i), rstd));
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    const Pair sum = add_residual<T, kResidual, kRounded>(load_tail(x + i, rest),
                                                          kResidual ? load_tail(residual + i, rest) : Pair{});
    if constexpr (kResidual) store_tail(new_residual + i, sum, rest);
    store_tail(normed + i, scaled<T, kNumerics == kHf>(sum, load_tail(weight + i, rest), rstd), rest);
  }
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
