// The arguments of the kernels of `attention`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

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

// The forward for single queries, each of which sees a prefix and then keys of its own: the bits of varlen_attention_fwd.
// Neighbours with the same prefix, as samples of one prompt are, read it together.
struct DecodeAttention {
  void* output;         // [rows, heads, dim]
  const void *q;        // [rows, heads, dim]
  const void *k, *v;    // [..., kv_heads, dim]
  const int64_t *prefix_first, *prefix_keys;  // [rows]: the prefix, anywhere in k and v; 0 keys: none
  const int64_t *own_first, *own_keys;        // [rows]: at least one
  int64_t rows, heads, kv_heads, dim;  // at most kFewLanes heads for each of the kv_heads; all tensors are dense
  float scale;                         // > 0
  int dtype, threads;
  char* scratch;  // 64-byte aligned; null: the kernel only returns how many bytes it needs, which follow from the sizes
};

}  // namespace m4ov

#define M4OV_ATTENTION_KERNELS(X) \
  X(int64_t, decode_attention, DecodeAttention)       \
  X(int64_t, varlen_attention_fwd, VarlenAttentionFwd) \
  X(int64_t, varlen_attention_bwd, VarlenAttentionBwd)
