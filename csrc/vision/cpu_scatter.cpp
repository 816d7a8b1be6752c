// Vision features into the rows of a packed batch: scatter_vision and deepstack_add, forward and backward. The backward
// of deepstack_add is that of scatter_vision without grad_base: its base has the gradient of the output.
#include "../common/copy.h"
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/simd.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int64_t kBlock = 8;  // neighbouring rows that one thread takes at a time

template <typename T, bool kStream>
M4OV_INLINE void add_row(T* target, const T* x, const T* y, int64_t columns) {
  int64_t i = 0;
  for (; i + kGroup <= columns; i += kGroup) {
    prefetch(x + i + kAheadBytes / static_cast<int64_t>(sizeof(T)));
    prefetch(y + i + kAheadBytes / static_cast<int64_t>(sizeof(T)));
    put<kStream>(target + i, load(x + i) + load(y + i));
  }
  if (i < columns) store_tail(target + i, load_tail(x + i, columns - i) + load_tail(y + i, columns - i), columns - i);
}

// Blocks of rows in turn: where the images lie in the batch, a thread has more to do, so no thread gets one long part.
template <typename Body>
static void for_rows(int64_t rows, int64_t row_bytes, int threads, const Body& body) {
  parallel_ranges(threads, rows * row_bytes, threads, [&](int64_t first, int64_t last) {
    for (int64_t id = first; id < last; ++id) {
      for (int64_t begin = id * kBlock; begin < rows; begin += threads * kBlock) {
        const int64_t end = begin + kBlock < rows ? begin + kBlock : rows;
        for (int64_t row = begin; row < end; ++row) body(row);
      }
    }
    fence();
  });
}

// source[row]: the feature that goes there, or -1. The first feature that has no row of its own, or -1.
static int64_t invert(int64_t* source, const int64_t* positions, int64_t rows, int64_t count) {
  for (int64_t row = 0; row < rows; ++row) source[row] = -1;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t row = positions[n];
    if (row < 0 || row >= rows || source[row] >= 0) return n;
    source[row] = n;
  }
  return -1;
}

static int64_t out_of_range(const int64_t* positions, int64_t rows, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    if (positions[n] < 0 || positions[n] >= rows) return n;
  }
  return -1;
}

static void gather(const FeatureRowsBwd& a) {
  const int64_t width = width_of(a.dtype), bytes = a.columns * width;
  const bool large = a.count * bytes >= kStreamBytes;
  for_rows(a.count, bytes, a.threads, [&](int64_t n) {
    copy(static_cast<char*>(a.grad_features) + n * bytes,
         static_cast<const char*>(a.grad_output) + a.positions[n] * a.grad_stride * width, bytes, large);
  });
}

template <typename T>
static void add(const FeatureRows& a) {
  const int64_t bytes = a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = a.rows * bytes >= kStreamBytes;
  for_rows(a.rows, bytes, a.threads, [&](int64_t row) {
    T* target = static_cast<T*>(a.output) + row * a.columns;
    const T* base = static_cast<const T*>(a.base) + row * a.base_stride;
    if (a.source[row] < 0) {
      copy(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(base), bytes, large);
      return;
    }
    const T* feature = static_cast<const T*>(a.features) + a.source[row] * a.features_stride;
    if (large && vector_aligned(target)) {
      add_row<T, true>(target, base, feature, a.columns);
    } else {
      add_row<T, false>(target, base, feature, a.columns);
    }
  });
}

}  // namespace

int64_t scatter_vision_fwd(const FeatureRows& a) {
  const int64_t bad = invert(a.source, a.positions, a.rows, a.count);
  if (bad >= 0) return bad;
  const int64_t width = width_of(a.dtype), bytes = a.columns * width;
  const bool large = a.rows * bytes >= kStreamBytes;
  for_rows(a.rows, bytes, a.threads, [&](int64_t row) {
    const int64_t n = a.source[row];
    const char* from = n < 0 ? static_cast<const char*>(a.base) + row * a.base_stride * width
                             : static_cast<const char*>(a.features) + n * a.features_stride * width;
    copy(static_cast<char*>(a.output) + row * bytes, from, bytes, large);
  });
  return -1;
}

int64_t scatter_vision_bwd(const FeatureRowsBwd& a) {
  const int64_t bad = a.grad_base ? invert(a.source, a.positions, a.rows, a.count)
                                  : out_of_range(a.positions, a.rows, a.count);
  if (bad >= 0) return bad;
  if (!a.grad_base) {
    if (a.grad_features) gather(a);
    return -1;
  }
  const int64_t width = width_of(a.dtype), bytes = a.columns * width;
  const bool large = a.rows * bytes >= kStreamBytes;
  for_rows(a.rows, bytes, a.threads, [&](int64_t row) {
    const int64_t n = a.source[row];
    char* target = static_cast<char*>(a.grad_base) + row * bytes;
    const char* grad = static_cast<const char*>(a.grad_output) + row * a.grad_stride * width;
    if (n < 0) {
      copy(target, grad, bytes, large);
      return;
    }
    if (large && vector_aligned(target)) {
      clear_row<true>(target, bytes);
    } else {
      clear_row<false>(target, bytes);
    }
    if (a.grad_features) copy(static_cast<char*>(a.grad_features) + n * bytes, grad, bytes, large);
  });
  return -1;
}

int64_t deepstack_add_fwd(const FeatureRows& a) {
  const int64_t bad = invert(a.source, a.positions, a.rows, a.count);
  if (bad < 0) with_dtype(a.dtype, [&](auto tag) { add<typename decltype(tag)::type>(a); });
  return bad;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
