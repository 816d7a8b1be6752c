// The arguments of the kernels of `head`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

// Tokens and rows of the weight in a tile of logits, and the least rows of a chunk of the backward.
constexpr int64_t kHeadTokens = 64, kHeadTile = 96, kHeadColumns = 5 * kHeadTile;

// Logits x = cap · tanh(z / cap) with z = (hidden · weightᵀ + bias) / temperature, of `vocab` rows of a weight whose row
// 0 is number `first` of the whole vocabulary. They are never in memory but for one tile of a thread.
struct LinearLogprob {
  const void *hidden, *weight, *bias;  // [tokens, dim], [vocab, dim], [vocab] or null
  const int64_t* target;               // [tokens], of the whole vocabulary; one that is not here is somebody else's
  const float* class_weight;           // [vocab], of the total; null: 1
  int64_t tokens, vocab, dim, hidden_row, weight_row, first;  // strides of rows
  float temperature, softcap;                                 // softcap 0: none
  int rounded;                                                // z and its quotient are rounded to the dtype
  // Logits of the first rows, [kept_rows, tokens rounded up to kHeadTokens], which the forward writes and the backward
  // reads instead of computing them again: of the dtype if they are rounded and not capped, else fp32.
  void* kept;
  int64_t kept_rows;  // a multiple of kHeadTile, or all
  int dtype, threads;
  char* scratch;  // 64-byte aligned; null: the kernel only returns how many bytes it needs
};

enum HeadState : int { kMaximum, kSum, kTarget, kCentred, kTotal, kHeadStates };

struct LinearLogprobFwd {
  LinearLogprob shared;
  // [kHeadStates, tokens]: the largest logit; the sum of exp(x - largest); the target's logit, 0 if it is not here; the
  // sum of exp(x - largest) · (x - largest), if asked for; the sum of class_weight · x, if asked for.
  float* state;
  int want_centred, want_total;
  int64_t top_k;         // 0: none
  float* top_values;     // [tokens, top_k], the largest first; -inf where there are fewer logits
  int64_t* top_indices;  // [tokens, top_k], of the whole vocabulary; the smaller of equal ones first; -1: none
};

enum HeadCoefficient : int { kShift, kLogSum, kConstant, kLinear, kHit, kUniform, kHeadCoefficients };

struct LinearLogprobBwd {
  LinearLogprob shared;
  // [kHeadCoefficients, tokens]. With log p = (x - shift) - log sum, the gradient of a logit x is
  // p · (constant + linear · log p) + uniform · class_weight, plus `hit` at the target.
  const float* coefficients;
  void *grad_hidden, *grad_weight, *grad_bias;  // dense, each may be null
  int64_t columns;  // of the vocabulary at a time; a multiple of kHeadColumns
};

// What lies between the distributions of two heads, whose targets, class weights and kept logits are not read; tokens,
// vocabulary, dtype, threads and scratch are the first's.
enum KlKind : int { kKlForward, kKlReverse, kKlJsd };

// Of a token: the largest logit and the sum of exp(logit - largest) of each head, x and y, and the sum of
// exp(x - largest x) · ((x - largest x) - (y - largest y)) over the words with a probability.
enum KlState : int { kFirstMaximum, kFirstSum, kSecondMaximum, kSecondSum, kGap, kKlStates };
// With p, q the first's and the second's probabilities, m their mean: (KL(p ‖ m) + KL(q ‖ m)) / 2, and KL(p ‖ m).
enum JsdState : int { kJsdTotal, kJsdFirst, kJsdStates };

struct LinearKlFwd {
  LinearLogprob first, second;
  const float* normalizer;  // null: KlState is wanted. Else [4, tokens], shift and log-sum of each: JsdState is
  float* state;             // [kKlStates or kJsdStates, tokens]
};

enum KlCoefficient : int {
  kPolicyShift, kPolicyLogSum, kReferenceShift, kReferenceLogSum, kScaleOf, kOffset, kKlCoefficients
};
static_assert(int(kKlCoefficients) == int(kHeadCoefficients));

struct LinearKlBwd {
  // Its coefficients: [kKlCoefficients, tokens]. With log p = (x - shift) - log sum of the policy, log q of the reference
  // and m the mean of both, the gradient of a logit x is scale · (p - q) for KL(q ‖ p), scale · p · (log p - log q -
  // offset) for KL(p ‖ q), scale · p · (log p - log m - offset) for the symmetric one.
  LinearLogprobBwd policy;
  LinearLogprob reference;
  int kind;
};

}  // namespace m4ov

#define M4OV_HEAD_KERNELS(X) \
  X(int64_t, linear_logprob_fwd, LinearLogprobFwd) \
  X(int64_t, linear_logprob_bwd, LinearLogprobBwd) \
  X(int64_t, linear_kl_fwd, LinearKlFwd) \
  X(int64_t, linear_kl_bwd, LinearKlBwd)
