// What bind.cpp and the kernels agree on: argument structs, and one set of functions per instruction set.
//
// Pointers are untyped because `dtype` is known only at run time. Inputs are `rows` dense rows, `*_stride` elements
// apart; outputs are contiguous. No pointer needs more than its element's alignment.
#pragma once

#include <stdint.h>

namespace m4ov {

enum DType : int { kFloat32, kBFloat16, kFloat16 };
enum Numerics : int { kHf, kVllm, kFp32 };

struct RmsNormFwd {
  void* normed;
  void* new_residual;  // null if and only if residual is
  float* rstd;         // [rows]
  const void* hidden_states;
  const void* weight;  // [columns]
  const void* residual;
  int64_t rows, columns, hidden_stride, residual_stride;
  float eps;
  int numerics, dtype, threads;
};

struct RmsNormBwd {
  void* grad_hidden_states;
  void* grad_weight;  // [columns], or null
  float* partials;    // scratch [blocks, columns rounded up to kPartialAlign], or null with grad_weight
  const void* grad_normed;
  const void* grad_residual;  // or null
  const void* hidden_states;
  const void* weight;
  const float* rstd;
  int64_t rows, columns, grad_stride, grad_residual_stride, hidden_stride;
  int64_t blocks;  // row blocks, each summed in order into one partial of grad_weight; not a function of `threads`
  int dtype, threads;
};

constexpr int64_t kPartialAlign = 32;

struct SwigluFwd {
  void* output;
  const void* gate;
  const void* up;
  int64_t rows, columns, gate_stride, up_stride;
  int numerics, dtype, threads;
};

struct SwigluBwd {
  void* grad_gate;
  void* grad_up;
  const void* grad_output;
  const void* gate;
  const void* up;
  int64_t rows, columns, grad_stride, gate_stride, up_stride;
  int dtype, threads;
};

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

// Softmax attention inside the sequences of a packed batch. Tensors are [tokens, heads, dim] with dense last dimension;
// sequence n has the query rows bounds_q[n] to bounds_q[n + 1] and the keys bounds_k[n] to bounds_k[n + 1].
struct VarlenAttention {
  const void *q, *k, *v;
  const int64_t *bounds_q, *bounds_k;  // [sequences + 1], checked
  int64_t sequences, tokens_q, tokens_k, heads, kv_heads, dim;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides
  float scale;                                          // > 0
  int causal;                                           // aligned to the end of the keys
  int dtype, threads;
  char* scratch;  // 64-byte aligned; null: the kernel only returns how many bytes it needs
};

struct VarlenAttentionFwd {
  VarlenAttention shared;
  void* output;  // [tokens_q, heads, dim]
  // [2, heads, tokens_q]: the largest score, before the scale, and the sum of exponentials relative to it; -inf and 0
  // where no key is seen. In two parts: one float32 of their logarithm is as coarse as scores are large.
  float* normalizer;
};

struct VarlenAttentionBwd {
  VarlenAttention shared;
  void *grad_q, *grad_k, *grad_v;  // dense
  const void* grad_output;
  const void* output;  // dense
  const float* normalizer;
  int64_t grad_row, grad_head;
};

struct Kernels {
  void (*rms_norm_fwd)(const RmsNormFwd&);
  void (*rms_norm_bwd)(const RmsNormBwd&);
  void (*swiglu_fwd)(const SwigluFwd&);
  void (*swiglu_bwd)(const SwigluBwd&);
  void (*cross_entropy_fwd)(const CrossEntropyFwd&);
  void (*cross_entropy_bwd)(const CrossEntropyBwd&);
  void (*accumulate)(const Accumulate&);
  int64_t (*varlen_attention_fwd)(const VarlenAttentionFwd&);
  int64_t (*varlen_attention_bwd)(const VarlenAttentionBwd&);
};

#define M4OV_DECLARE_KERNELS(variant)                  \
  namespace variant {                                  \
  void rms_norm_fwd(const RmsNormFwd&);                \
  void rms_norm_bwd(const RmsNormBwd&);                \
  void swiglu_fwd(const SwigluFwd&);                   \
  void swiglu_bwd(const SwigluBwd&);                   \
  void cross_entropy_fwd(const CrossEntropyFwd&);      \
  void cross_entropy_bwd(const CrossEntropyBwd&);      \
  void accumulate(const Accumulate&);                  \
  int64_t varlen_attention_fwd(const VarlenAttentionFwd&); \
  int64_t varlen_attention_bwd(const VarlenAttentionBwd&); \
  }
M4OV_DECLARE_KERNELS(baseline)
M4OV_DECLARE_KERNELS(avx2)
M4OV_DECLARE_KERNELS(avx512)
M4OV_DECLARE_KERNELS(avx512_bf16)
#undef M4OV_DECLARE_KERNELS

}  // namespace m4ov
