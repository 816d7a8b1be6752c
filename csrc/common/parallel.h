// Splitting work over PyTorch's OpenMP threads. No result may depend on how many there are.
#pragma once

#include <omp.h>
#include <stdint.h>

#include "simd.h"
#include "types.h"

namespace m4ov {
namespace M4OV_VARIANT {

// Waking the threads costs a few µs: as much as one core needs for about this many bytes.
constexpr int64_t kParallelBytes = 64 << 10;
// Outputs larger than this would push everything else out of the caches, so they are written past them.
constexpr int64_t kStreamBytes = 16 << 20;

// body(begin, end) over contiguous ranges of [0, count), one per thread.
template <typename Body>
static void parallel_ranges(int64_t count, int64_t bytes, int threads, const Body& body) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1 || bytes < kParallelBytes) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t each = count / team, rest = count % team;
    const int64_t begin = id * each + (id < rest ? id : rest);
    const int64_t end = begin + each + (id < rest);
    if (begin < end) body(begin, end);
  }
}

template <typename T>
struct Tag {
  using type = T;
};

// body(Tag<T>{}) for the element type that `dtype` names.
template <typename Body>
M4OV_INLINE void with_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case kBFloat16:
      return body(Tag<Bf16>{});
    case kFloat16:
      return body(Tag<Fp16>{});
    default:
      return body(Tag<float>{});
  }
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
