// What the norms share: the residual add, and how sums over a row are taken.
#pragma once

#include "../common/partials.h"

namespace m4ov {
namespace M4OV_VARIANT {

template <typename T, bool kResidual, bool kRounded>
M4OV_INLINE Pair add_residual(Pair x, Pair residual) {
  if constexpr (kResidual) x = x + residual;
  return kResidual && kRounded ? round_to<T>(x) : x;
}

// Steps of a sum over a row before it moves to a sum of such sums. A lane that adds equal values rounds in the same
// direction at every step, which a wide fp32 row would show; 16-bit results would not.
template <typename T>
constexpr int64_t kRun = kSame<T, float> ? 8 : INT64_MAX;

// Says whether a group is whole (kGroup elements) or the end of a row (fewer).
template <bool kWhole>
struct Whole {
  static constexpr bool value = kWhole;
};

template <bool kWhole, typename T>
M4OV_INLINE Pair load_group(const T* source, int64_t count) {
  if constexpr (kWhole) {
    return load(source);
  } else {
    return load_tail(source, count);
  }
}
template <bool kWhole, bool kStream, typename T>
M4OV_INLINE void put_group(T* target, Pair x, int64_t count) {
  if constexpr (kWhole) {
    put<kStream>(target, x);
  } else {
    store_tail(target, x, count);
  }
}

// body(Whole, first element, how many) for every group of a row.
template <typename Body>
M4OV_INLINE void each_group(int64_t columns, const Body& body) {
  int64_t i = 0;
  for (; i + kGroup <= columns; i += kGroup) body(Whole<true>{}, i, int64_t{kGroup});
  if (i < columns) body(Whole<false>{}, i, columns - i);
}

// Several sums over one row at once: term(Whole, first element, how many, sums to add to).
template <typename T, int kSums, typename Term>
M4OV_INLINE void sum_row(int64_t columns, float (&results)[kSums], const Term& term) {
  Pair even[kSums], odd[kSums], runs[kSums];
  for (int k = 0; k < kSums; ++k) even[k] = odd[k] = runs[k] = both(set1(0.0f));
  int64_t i = 0;
  for (int64_t left = columns / (2 * kGroup); left > 0; left -= kRun<T>) {
    for (int64_t step = left < kRun<T> ? left : kRun<T>; step > 0; --step, i += 2 * kGroup) {
      term(Whole<true>{}, i, int64_t{kGroup}, even);
      term(Whole<true>{}, i + kGroup, int64_t{kGroup}, odd);
    }
    for (int k = 0; k < kSums; ++k) {
      runs[k] = runs[k] + (even[k] + odd[k]);
      even[k] = odd[k] = both(set1(0.0f));
    }
  }
  if (i + kGroup <= columns) {
    term(Whole<true>{}, i, int64_t{kGroup}, even);
    i += kGroup;
  }
  if (i < columns) term(Whole<false>{}, i, columns - i, odd);
  for (int k = 0; k < kSums; ++k) results[k] = lane_sum(runs[k] + (even[k] + odd[k]));
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
