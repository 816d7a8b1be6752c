// SwiGLU, silu(gate)·up: forward and backward.
#include "../common/parallel.h"
#include "../common/simd.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int64_t kSegment = 4096;  // elements per unit of work when all rows form one dense run

// The hardware's prefetchers stop at page ends; this keeps reads going across them.
template <typename T>
constexpr int64_t kAhead = 2048 / sizeof(T);

// body(offset of a dense run in the outputs, its row, its column, its length) over this call's work, in parallel.
template <typename Body>
static void for_runs(int64_t rows, int64_t columns, bool dense, int64_t bytes, int threads, const Body& body) {
  if (dense) {
    const int64_t count = rows * columns;
    parallel_ranges((count + kSegment - 1) / kSegment, bytes, threads, [&](int64_t begin, int64_t end) {
      const int64_t last = end * kSegment < count ? end * kSegment : count;
      body(begin * kSegment, int64_t{0}, begin * kSegment, last - begin * kSegment);
    });
  } else {
    parallel_ranges(rows, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row * columns, row, int64_t{0}, columns);
    });
  }
}

template <typename T>
M4OV_INLINE Pair sigmoid(Pair x) {
  const Pair one = both(set1(1.0f));
  return reciprocal_for<T>(one + exp_for<T>(both(set1(0.0f)) - x));
}

template <typename T, bool kRoundTwice>
M4OV_INLINE Pair swiglu(Pair gate, Pair up) {
  const Pair silu = gate * sigmoid<T>(gate);
  return (kRoundTwice ? round_to<T>(silu) : silu) * up;
}

template <typename T, bool kRoundTwice, bool kStream>
static void forward_run(T* output, const T* gate, const T* up, int64_t count) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    prefetch(gate + i + kAhead<T>);
    prefetch(up + i + kAhead<T>);
    put<kStream>(output + i, swiglu<T, kRoundTwice>(load(gate + i), load(up + i)));
  }
  if (i < count) {
    const int64_t rest = count - i;
    store_tail(output + i, swiglu<T, kRoundTwice>(load_tail(gate + i, rest), load_tail(up + i, rest)), rest);
  }
}

template <typename T, bool kRoundTwice>
static void forward(const SwigluFwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = bytes >= kStreamBytes, dense = a.gate_stride == a.columns && a.up_stride == a.columns;
  for_runs(a.rows, a.columns, dense, bytes, a.threads, [&](int64_t out, int64_t row, int64_t column, int64_t count) {
    T* output = static_cast<T*>(a.output) + out;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
    if (large && vector_aligned(output)) {
      forward_run<T, kRoundTwice, true>(output, gate, up, count);
      fence();
    } else {
      forward_run<T, kRoundTwice, false>(output, gate, up, count);
    }
  });
}

struct Gradients {
  Pair gate, up;
};

template <typename T>
M4OV_INLINE Gradients gradients(Pair grad, Pair gate, Pair up) {
  const Pair one = both(set1(1.0f)), sig = sigmoid<T>(gate);
  return {grad * up * sig * fma(gate, one - sig, one), grad * (gate * sig)};
}

template <typename T, bool kStream>
static void backward_run(T* grad_gate, T* grad_up, const T* grad, const T* gate, const T* up, int64_t count) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    prefetch(grad + i + kAhead<T>);
    prefetch(gate + i + kAhead<T>);
    prefetch(up + i + kAhead<T>);
    const Gradients result = gradients<T>(load(grad + i), load(gate + i), load(up + i));
    put<kStream>(grad_gate + i, result.gate);
    put<kStream>(grad_up + i, result.up);
  }
  if (i < count) {
    const int64_t rest = count - i;
    const Gradients result =
        gradients<T>(load_tail(grad + i, rest), load_tail(gate + i, rest), load_tail(up + i, rest));
    store_tail(grad_gate + i, result.gate, rest);
    store_tail(grad_up + i, result.up, rest);
  }
}

template <typename T>
static void backward(const SwigluBwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = bytes >= kStreamBytes;
  const bool dense = a.grad_stride == a.columns && a.gate_stride == a.columns && a.up_stride == a.columns;
  for_runs(a.rows, a.columns, dense, bytes, a.threads, [&](int64_t out, int64_t row, int64_t column, int64_t count) {
    T* grad_gate = static_cast<T*>(a.grad_gate) + out;
    T* grad_up = static_cast<T*>(a.grad_up) + out;
    const T* grad = static_cast<const T*>(a.grad_output) + row * a.grad_stride + column;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
    if (large && vector_aligned(grad_gate) && vector_aligned(grad_up)) {
      backward_run<T, true>(grad_gate, grad_up, grad, gate, up, count);
      fence();
    } else {
      backward_run<T, false>(grad_gate, grad_up, grad, gate, up, count);
    }
  });
}

}  // namespace

void swiglu_fwd(const SwigluFwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.numerics == kFp32 ? forward<T, false>(a) : forward<T, true>(a);
  });
}

void swiglu_bwd(const SwigluBwd& a) {
  with_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(a); });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
