// Gradients of a vector that all rows share (a weight, a bias): rows are summed in order within fixed blocks, each into
// an fp32 partial, then the blocks in order. No bit depends on the number of threads.
#pragma once

#include "parallel.h"

namespace m4ov {
namespace M4OV_VARIANT {

constexpr int64_t padded(int64_t columns) { return (columns + kPartialAlign - 1) / kPartialAlign * kPartialAlign; }

// target[i] = the sum over blocks of partials[block · stride + i], rounded to T.
template <typename T>
static void sum_partials(void* target, const float* partials, int64_t blocks, int64_t stride, int64_t columns,
                         int threads) {
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  parallel_ranges(groups, blocks * columns * 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kGroup; i < end * kGroup; i += kGroup) {
      Pair sum = both(set1(0.0f));
      for (int64_t block = 0; block < blocks; ++block) sum = sum + load(partials + block * stride + i);
      T* place = static_cast<T*>(target) + i;
      const int64_t rest = columns - i;
      rest >= kGroup ? store(place, sum) : store_tail(place, sum, rest);
    }
  });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
