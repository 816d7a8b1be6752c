// The arguments of the kernels of `decoding`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

// A decoder layer: pre-norm attention with norms of queries and keys, and SwiGLU. Weights are [out, in], dense; biases may
// be null. Nothing but pointers: Python hands on a table of them.
struct DecodeLayer {
  const void *input_norm, *q, *q_bias, *k, *k_bias, *v, *v_bias, *q_norm, *k_norm, *o, *o_bias;
  const void *post_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
  void *keys, *values;  // [..., kv_heads, dim], of all that was read before; this token's are written there
};
constexpr int64_t kDecodeLayerPointers = sizeof(DecodeLayer) / sizeof(void*);

// One token of each of some samples through all layers: the kernels that a packed forward inside invariant() calls, in its
// order, in one call.
struct DecodeStep {
  void* normed;           // [rows, width]: the last norm's
  const void* embedding;  // [..., width]
  const void* norm;       // [width]
  const DecodeLayer* layers;
  const int64_t *tokens, *positions;  // [rows]; a position is that of all three axes
  // [rows]: of a sample the first token and the number of keys of its prompt; the first of its own, and how many are there.
  const int64_t *prefix_first, *prefix_keys, *own_first, *own_keys;
  const double* inv_freq;  // [dim / 2], of the rotation
  int64_t rows, depth, width, heads, kv_heads, dim, inner;
  double eps;   // of all norms
  float scale;  // of the scores
  int dtype, threads;
  char* scratch;  // 64-byte aligned; null: the kernel only returns how many bytes it needs, which follow from the sizes
};

// Tokens by inversion: of each row the first whose cumulative probability exceeds the draw.
struct ChooseTokens {
  int64_t* tokens;       // [rows]
  const float* logits;   // [vocab, stride], of one state in each column
  const int64_t* column;  // [rows]: the row's
  const float* largest;  // [rows], logits of the row
  const double* draws;   // [rows], in [0, 1)
  int64_t rows, vocab, stride;
  int threads;
  char* scratch;  // as above
};

}  // namespace m4ov

#define M4OV_DECODING_KERNELS(X)            \
  X(int64_t, choose_tokens, ChooseTokens) \
  X(int64_t, decode_step, DecodeStep)
