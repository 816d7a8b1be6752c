// The gated activations, f(gate)·up: forward and backward.
#include "gated_run.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

template <typename T, Function kFunction, bool kRoundTwice>
static void forward(const GatedFwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = bytes >= kStreamBytes, dense = a.gate_stride == a.columns && a.up_stride == a.columns;
  for_runs(a.rows, a.columns, dense, bytes, a.threads, [&](int64_t out, int64_t row, int64_t column, int64_t count) {
    T* output = static_cast<T*>(a.output) + out;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + column;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + column;
    if (large && vector_aligned(output)) {
      forward_run<T, kFunction, kRoundTwice, true>(output, gate, up, count);
      fence();
    } else {
      forward_run<T, kFunction, kRoundTwice, false>(output, gate, up, count);
    }
  });
}

struct Gradients {
  Pair gate, up;
};

template <typename T, Function kFunction>
M4OV_INLINE Gradients gradients(Pair grad, Pair gate, Pair up) {
  const ActivatedPair at = differentiate<T, kFunction>(gate);
  return {grad * up * at.slope, grad * at.value};
}

template <typename T, Function kFunction, bool kStream>
static void backward_run(T* grad_gate, T* grad_up, const T* grad, const T* gate, const T* up, int64_t count) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    prefetch(grad + i + kAhead<T>);
    prefetch(gate + i + kAhead<T>);
    prefetch(up + i + kAhead<T>);
    const Gradients result = gradients<T, kFunction>(load(grad + i), load(gate + i), load(up + i));
    put<kStream>(grad_gate + i, result.gate);
    put<kStream>(grad_up + i, result.up);
  }
  if (i < count) {
    const int64_t rest = count - i;
    const Gradients result =
        gradients<T, kFunction>(load_tail(grad + i, rest), load_tail(gate + i, rest), load_tail(up + i, rest));
    store_tail(grad_gate + i, result.gate, rest);
    store_tail(grad_up + i, result.up, rest);
  }
}

template <typename T, Function kFunction>
static void backward(const GatedBwd& a) {
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
      backward_run<T, kFunction, true>(grad_gate, grad_up, grad, gate, up, count);
      fence();
    } else {
      backward_run<T, kFunction, false>(grad_gate, grad_up, grad, gate, up, count);
    }
  });
}

template <Function kFunction>
static void forward(const GatedFwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.numerics == kFp32 ? forward<T, kFunction, false>(a) : forward<T, kFunction, true>(a);
  });
}

template <Function kFunction>
static void backward(const GatedBwd& a) {
  with_dtype(a.dtype, [&](auto tag) { backward<typename decltype(tag)::type, kFunction>(a); });
}

}  // namespace

void swiglu_fwd(const GatedFwd& a) { forward<kSilu>(a); }
void swiglu_bwd(const GatedBwd& a) { backward<kSilu>(a); }
void geglu_fwd(const GegluFwd& a) { a.tanh ? forward<kGeluTanh>(a) : forward<kGeluErf>(a); }
void geglu_bwd(const GegluBwd& a) { a.tanh ? backward<kGeluTanh>(a) : backward<kGeluErf>(a); }

}  // namespace M4OV_VARIANT
}  // namespace m4ov
