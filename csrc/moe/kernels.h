// The arguments of the kernels of `moe`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

// The top_k experts of every token by their logits, and their weights. Softmax in fp32.
struct RouteTopk {
  float* weights;     // [tokens, top_k]
  int32_t* experts;   // [tokens, top_k]
  int64_t* counts;    // [count]
  float* probability; // [count]
  float* partials;    // scratch [blocks, count rounded up to kPartialAlign]
  float* row;         // scratch [threads, the same]
  const void* logits; // [tokens, count]
  int64_t tokens, count, logits_row, top_k, blocks;
  int normalize, dtype, threads;
};

struct RouteTopkBwd {
  void* grad_logits;              // [tokens, count]
  float* row;                     // scratch [threads, count rounded up to kPartialAlign]
  const void* logits;             // [tokens, count]
  const float* weights;           // [tokens, top_k]
  const int32_t* experts;         // [tokens, top_k]
  const float* grad_weights;      // [tokens, top_k], or null
  const float* grad_probability;  // [count], or null
  int64_t tokens, count, logits_row, top_k;
  int normalize, dtype, threads;
};

// rows[order[t, k]] = hidden_states[t], by expert, then by t and k. Result: -1, or the first slot t · top_k + k whose
// expert is out of range; then nothing was written.
struct Permute {
  void* rows;        // [tokens · top_k, width], dense
  int32_t* order;    // [tokens, top_k]
  int32_t* offsets;  // [count + 1]
  int32_t* next;     // scratch [count]
  const void* hidden_states;
  const int32_t* experts;  // [tokens, top_k]
  int64_t tokens, top_k, width, count, hidden_row;
  int dtype, threads;
};

// output[t] = sum over k of weights[t, k] · rows[order[t, k]]. Result: -1, or the first slot whose row is out of range or
// was there before; then nothing was written.
struct Unpermute {
  void* output;      // [tokens, width], dense
  uint8_t* seen;     // scratch [tokens · top_k]
  const void* rows;  // [tokens · top_k, width]
  const int32_t* order;
  const float* weights;  // [tokens, top_k], or null: 1
  int64_t tokens, top_k, width, row_stride;
  int dtype, threads;
};

struct UnpermuteBwd {
  void* grad_rows;      // [tokens · top_k, width], dense; or null
  float* grad_weights;  // [tokens, top_k], or null
  uint8_t* seen;        // scratch [tokens · top_k]
  const void* grad_output;
  const void* rows;  // of which only grad_weights is made; may be null without it
  const int32_t* order;
  const float* weights;  // or null: 1
  int64_t tokens, top_k, width, grad_stride, row_stride;
  int dtype, threads;
};

// Expert e has the rows offsets[e] to offsets[e + 1]. output[s] = rows[s] · weight[e]ᵀ, weight [experts, columns, width];
// across: weight [experts, width, columns], not transposed.
struct GroupedLinear {
  void* output;      // [rows, columns], dense
  const void* rows;  // [rows, width]
  const void* weight;
  const int64_t* offsets;  // [experts + 1], checked
  int64_t experts, columns, width, row_stride, weight_row, weight_expert;  // strides in elements
  int across, dtype, threads;
  char* scratch;  // 64-byte aligned; null: the kernel only returns how many bytes it needs
};

// grad_weight[e] = grad_output[of e]ᵀ · rows[of e]; zeros for an expert without rows.
struct GroupedLinearWeight {
  void* grad_weight;        // [experts, columns, width], dense
  const void* grad_output;  // [rows, columns]
  const void* rows;         // [rows, width]
  const int64_t* offsets;   // [experts + 1], checked
  int64_t experts, columns, width, grad_stride, row_stride;
  int dtype, threads;
  char* scratch;  // as above
};

}  // namespace m4ov

#define M4OV_MOE_KERNELS(X)                            \
  X(void, route_topk_fwd, RouteTopk)                   \
  X(void, route_topk_bwd, RouteTopkBwd)                \
  X(int64_t, permute_fwd, Permute)                     \
  X(int64_t, unpermute_fwd, Unpermute)                 \
  X(int64_t, unpermute_bwd, UnpermuteBwd)              \
  X(int64_t, grouped_linear, GroupedLinear)            \
  X(int64_t, grouped_linear_weight, GroupedLinearWeight)
