// GELU of a linear layer's product, with the layer's bias added on the way: forward and backward.
#include "../common/partials.h"
#include "functions.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

template <typename T, Function kFunction, bool kBias, bool kStream>
static void forward_run(T* output, const T* input, const T* bias, int64_t count) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    prefetch(input + i + kAhead<T>);
    Pair x = load(input + i);
    if constexpr (kBias) x = x + load(bias + i);
    put<kStream>(output + i, activate<T, kFunction>(x));
  }
  if (i < count) {
    const int64_t rest = count - i;
    Pair x = load_tail(input + i, rest);
    if constexpr (kBias) x = x + load_tail(bias + i, rest);
    store_tail(output + i, activate<T, kFunction>(x), rest);
  }
}

template <typename T, Function kFunction, bool kBias>
static void forward(const GeluFwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = bytes >= kStreamBytes, dense = !kBias && a.input_stride == a.columns;
  for_runs(a.rows, a.columns, dense, bytes, a.threads, [&](int64_t out, int64_t row, int64_t column, int64_t count) {
    T* output = static_cast<T*>(a.output) + out;
    const T* input = static_cast<const T*>(a.input) + row * a.input_stride + column;
    const T* bias = static_cast<const T*>(a.bias);
    if (large && vector_aligned(output)) {
      forward_run<T, kFunction, kBias, true>(output, input, bias, count);
      fence();
    } else {
      forward_run<T, kFunction, kBias, false>(output, input, bias, count);
    }
  });
}

template <typename T, Function kFunction, bool kBias>
M4OV_INLINE Pair input_gradient(Pair grad, Pair x, Pair bias) {
  if constexpr (kBias) x = x + bias;
  return grad * differentiate<T, kFunction>(x).slope;
}

template <typename T, Function kFunction, bool kBias, bool kPartial, bool kStream>
static void backward_run(T* grad_input, float* partial, const T* grad, const T* input, const T* bias, int64_t count) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    prefetch(grad + i + kAhead<T>);
    prefetch(input + i + kAhead<T>);
    const Pair added = kBias ? load(bias + i) : Pair{};
    const Pair result = input_gradient<T, kFunction, kBias>(load(grad + i), load(input + i), added);
    put<kStream>(grad_input + i, result);
    if constexpr (kPartial) store(partial + i, load(partial + i) + result);
  }
  if (i < count) {
    const int64_t rest = count - i;
    const Pair added = kBias ? load_tail(bias + i, rest) : Pair{};
    const Pair result =
        input_gradient<T, kFunction, kBias>(load_tail(grad + i, rest), load_tail(input + i, rest), added);
    store_tail(grad_input + i, result, rest);
    if constexpr (kPartial) store(partial + i, load(partial + i) + result);
  }
}

template <typename T, Function kFunction, bool kBias, bool kPartial>
static void backward(const GeluBwd& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = bytes >= kStreamBytes;
  const auto run = [&](int64_t out, int64_t row, int64_t column, int64_t count, float* partial) {
    T* grad_input = static_cast<T*>(a.grad_input) + out;
    const T* grad = static_cast<const T*>(a.grad_output) + row * a.grad_stride + column;
    const T* input = static_cast<const T*>(a.input) + row * a.input_stride + column;
    const T* bias = static_cast<const T*>(a.bias);
    if (large && vector_aligned(grad_input)) {
      backward_run<T, kFunction, kBias, kPartial, true>(grad_input, partial, grad, input, bias, count);
      fence();
    } else {
      backward_run<T, kFunction, kBias, kPartial, false>(grad_input, partial, grad, input, bias, count);
    }
  };
  if constexpr (!kPartial) {
    const bool dense = !kBias && a.grad_stride == a.columns && a.input_stride == a.columns;
    for_runs(a.rows, a.columns, dense, bytes, a.threads, [&](int64_t out, int64_t row, int64_t column, int64_t count) {
      run(out, row, column, count, nullptr);
    });
  } else {
    const int64_t length = padded(a.columns);
    parallel_ranges(a.blocks, bytes, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        float* partial = a.partials + block * length;
        memset(partial, 0, length * sizeof(float));
        const int64_t last = a.rows * (block + 1) / a.blocks;
        for (int64_t row = a.rows * block / a.blocks; row < last; ++row) {
          run(row * a.columns, row, 0, a.columns, partial);
        }
      }
    });
    sum_partials<T>(a.grad_bias, a.partials, a.blocks, length, a.columns, a.threads);
  }
}

template <typename T, Function kFunction>
static void backward(const GeluBwd& a) {
  if (!a.bias) return backward<T, kFunction, false, false>(a);
  return a.grad_bias ? backward<T, kFunction, true, true>(a) : backward<T, kFunction, true, false>(a);
}

}  // namespace

void gelu_fwd(const GeluFwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.tanh) return a.bias ? forward<T, kGeluTanh, true>(a) : forward<T, kGeluTanh, false>(a);
    return a.bias ? forward<T, kGeluErf, true>(a) : forward<T, kGeluErf, false>(a);
  });
}

void gelu_bwd(const GeluBwd& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.tanh ? backward<T, kGeluTanh>(a) : backward<T, kGeluErf>(a);
  });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
