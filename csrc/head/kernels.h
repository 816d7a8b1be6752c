// The arguments of the kernels of `head`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

// A chunk of the vocabulary, `columns` logits per row from vocabulary index `first` on.
struct CrossEntropyFwd {
  float* state;  // [4, rows]: running maximum, sum of exp(x - maximum), target logit, sum of logits
  const void* logits;
  const int64_t* target;  // [rows]
  int64_t rows, columns, logits_stride, first;
  int want_total;  // whether to keep the sum of logits (label smoothing)
  int dtype, threads;
};

struct CrossEntropyBwd {
  void* gradient;  // may be the logits
  const void* logits;
  const int64_t* target;  // a negative target makes the row's gradient zero
  const float* normalizer;  // [rows, 2]: maximum, log of the sum of exp(x - maximum)
  const float* grad_loss;
  int64_t rows, columns, logits_stride, first;  // the stride is the gradient's too
  float target_weight;   // 1 - label_smoothing
  float uniform_weight;  // label_smoothing / vocabulary size
  int dtype, threads;
};

// A running fp32 sum of tensors: accumulator = (assign ? 0 : accumulator) + addend; with `output`, the sum goes there
// instead, rounded. The accumulator's element order is the kernel's own; it has room for a multiple of kPartialAlign.
struct Accumulate {
  float* accumulator;
  void* output;
  const void* addend;
  int64_t count;
  int assign, dtype, threads;
};

}  // namespace m4ov

#define M4OV_HEAD_KERNELS(X) \
  X(void, cross_entropy_fwd, CrossEntropyFwd) \
  X(void, cross_entropy_bwd, CrossEntropyBwd) \
  X(void, accumulate, Accumulate)
