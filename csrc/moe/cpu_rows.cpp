// permute and unpermute: rows of tokens to the experts and back.
//
// Token by token: its row is read once and written top_k times, or the other way round.
#include "../common/copy.h"
#include "../common/kernels.h"
#include "../common/parallel.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// The first slot whose row is none of `count`, or is that of an earlier slot; or -1.
static int64_t not_once(const int32_t* order, uint8_t* seen, int64_t count) {
  if (count) memset(seen, 0, count);  // `seen` may be null else
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = order[i];
    if (row < 0 || row >= count || seen[row]) return i;
    seen[row] = 1;
  }
  return -1;
}

template <bool kWhole, typename T>
M4OV_INLINE Pair load_some(const T* source, int64_t count) {
  if constexpr (kWhole) {
    return load(source);
  } else {
    return load_tail(source, count);
  }
}

template <typename T, bool kStream>
struct Rows {
  // The sum of a token's rows, from column i on.
  template <bool kWhole>
  M4OV_INLINE Pair sum(const Unpermute& a, const int32_t* from, const float* weights, int64_t i) {
    Pair total = both(set1(0.0f));
    for (int64_t k = 0; k < a.top_k; ++k) {
      const T* row = static_cast<const T*>(a.rows) + from[k] * a.row_stride + i;
      if constexpr (kWhole) prefetch(row + kAheadBytes / static_cast<int64_t>(sizeof(T)));
      const Pair x = load_some<kWhole>(row, a.width - i);
      total = weights ? fma(x, both(set1(weights[k])), total) : total + x;
    }
    return total;
  }

  static void gather(const Unpermute& a, int64_t token) {
    T* target = static_cast<T*>(a.output) + token * a.width;
    const int32_t* from = a.order + token * a.top_k;
    const float* weights = a.weights ? a.weights + token * a.top_k : nullptr;
    int64_t i = 0;
    for (; i + kGroup <= a.width; i += kGroup) put<kStream>(target + i, sum<true>(a, from, weights, i));
    if (i < a.width) store_tail(target + i, sum<false>(a, from, weights, i), a.width - i);
  }

  static void scale(T* target, const T* source, float weight, int64_t width) {
    const Pair factor = both(set1(weight));
    int64_t i = 0;
    for (; i + kGroup <= width; i += kGroup) put<kStream>(target + i, load(source + i) * factor);
    if (i < width) store_tail(target + i, load_tail(source + i, width - i) * factor, width - i);
  }
};

// In runs of 64 groups, of which sums are taken by themselves: fp32 loses less than in one long sum.
template <typename T>
static float dot(const T* x, const T* y, int64_t width) {
  Pair total = both(set1(0.0f));
  int64_t i = 0;
  while (i + kGroup <= width) {
    Pair run = both(set1(0.0f));
    for (int step = 0; step < 64 && i + kGroup <= width; ++step, i += kGroup) run = fma(load(x + i), load(y + i), run);
    total = total + run;
  }
  if (i < width) total = fma(load_tail(x + i, width - i), load_tail(y + i, width - i), total);
  return lane_sum(total);
}

template <typename T, bool kStream>
static void spread(const UnpermuteBwd& a, int64_t token) {
  const T* grad = static_cast<const T*>(a.grad_output) + token * a.grad_stride;
  for (int64_t k = 0; k < a.top_k; ++k) {
    const int64_t slot = token * a.top_k + k, row = a.order[slot];
    if (a.grad_weights) a.grad_weights[slot] = dot(grad, static_cast<const T*>(a.rows) + row * a.row_stride, a.width);
    if (!a.grad_rows) continue;
    T* target = static_cast<T*>(a.grad_rows) + row * a.width;
    if (a.weights) {
      Rows<T, kStream>::scale(target, grad, a.weights[slot], a.width);
    } else {
      copy(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(grad), a.width * sizeof(T), kStream);
    }
  }
}

// body(stream) for a large and aligned output whose rows are all aligned, else body(no stream).
template <typename T, typename Body>
M4OV_INLINE void with_stream(const void* output, int64_t rows, int64_t width, const Body& body) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  if (output && rows * bytes >= kStreamBytes && vector_aligned(output) && bytes % kVectorBytes == 0) {
    body(Tag<char>{});
  } else {
    body(Tag<void>{});
  }
}

template <typename Body>
static void for_tokens(int64_t tokens, int64_t bytes, int threads, const Body& body) {
  parallel_ranges(tokens, tokens * bytes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) body(token);
    fence();
  });
}

}  // namespace

int64_t permute_fwd(const Permute& a) {
  const int64_t slots = a.tokens * a.top_k;
  for (int64_t i = 0; i < slots; ++i) {
    if (a.experts[i] < 0 || a.experts[i] >= a.count) return i;
  }
  memset(a.offsets, 0, (a.count + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < slots; ++i) ++a.offsets[a.experts[i] + 1];
  for (int64_t e = 0; e < a.count; ++e) {
    a.next[e] = a.offsets[e];
    a.offsets[e + 1] += a.offsets[e];
  }
  for (int64_t i = 0; i < slots; ++i) a.order[i] = a.next[a.experts[i]]++;

  const int64_t size = width_of(a.dtype), bytes = a.width * size;
  const bool large = slots * bytes >= kStreamBytes;
  for_tokens(a.tokens, a.top_k * bytes, a.threads, [&](int64_t token) {
    const char* source = static_cast<const char*>(a.hidden_states) + token * a.hidden_row * size;
    for (int64_t k = 0; k < a.top_k; ++k) {
      copy(static_cast<char*>(a.rows) + a.order[token * a.top_k + k] * bytes, source, bytes, large);
    }
  });
  return -1;
}

int64_t unpermute_fwd(const Unpermute& a) {
  const int64_t bad = not_once(a.order, a.seen, a.tokens * a.top_k);
  if (bad >= 0) return bad;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_stream<T>(a.output, a.tokens, a.width, [&](auto stream) {
      constexpr bool kStream = kSame<typename decltype(stream)::type, char>;
      for_tokens(a.tokens, (a.top_k + 1) * a.width * static_cast<int64_t>(sizeof(T)), a.threads,
                 [&](int64_t token) { Rows<T, kStream>::gather(a, token); });
    });
  });
  return -1;
}

int64_t unpermute_bwd(const UnpermuteBwd& a) {
  const int64_t bad = not_once(a.order, a.seen, a.tokens * a.top_k);
  if (bad >= 0) return bad;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_stream<T>(a.grad_rows, a.tokens * a.top_k, a.width, [&](auto stream) {
      constexpr bool kStream = kSame<typename decltype(stream)::type, char>;
      for_tokens(a.tokens, (a.top_k + 1) * a.width * static_cast<int64_t>(sizeof(T)), a.threads,
                 [&](int64_t token) { spread<T, kStream>(a, token); });
    });
  });
  return -1;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
