// route_topk: softmax over the experts, the largest logits, and how the tokens were spread.
#include "../common/kernels.h"
#include "../common/pack.h"
#include "../common/parallel.h"
#include "../common/scratch.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// One token's experts: e^(logit - maximum), in whole vectors with zeros behind the last, and their sum.
struct Softmax {
  float maximum, sum;
};

template <typename T>
static Softmax exponentials(float* row, const T* logits, int64_t count) {
  widen(row, logits, count);
  const int64_t padded = rounded_up(count, kLanes);
  for (int64_t i = count; i < padded; ++i) row[i] = -__builtin_inff();
  V most = set1(-__builtin_inff());
  for (int64_t i = 0; i < padded; i += kLanes) most = max(load_vector(row + i), most);  // of NaN, what there was
  float lanes[kLanes], maximum = -__builtin_inff();
  store_vector(lanes, most);
  for (int i = 0; i < kLanes; ++i) maximum = lanes[i] > maximum ? lanes[i] : maximum;
  V total = set1(0.0f);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const V x = exp_full(load_vector(row + i) - set1(maximum));
    store_vector(row + i, x);
    total = total + x;
  }
  // What stands behind the last expert is e^-inf, or NaN where the maximum is infinite: then all are.
  for (int64_t i = count; i < padded; ++i) row[i] = 0.0f;
  return {maximum, lane_sum(Pair{total, set1(0.0f)})};
}

// Larger for what comes first: by the logit, NaN before all, then the lower expert.
M4OV_INLINE uint64_t rank_of(float logit, int64_t expert) {
  const float x = logit + 0.0f;  // -0 is 0
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t ordered = x != x ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(ordered) << 32) | (0xffffffffu - static_cast<uint32_t>(expert));
}

// The experts of the largest `top_k` logits, in order, by insertion: later ones are seldom among them.
static void largest(int32_t* experts, const float* logits, int64_t count, int64_t top_k) {
  constexpr int64_t kMost = 64;  // of more, the experts written so far are ranked again
  uint64_t ranks[kMost];
  const bool small = top_k <= kMost;
  int64_t held = 0;
  float last = -__builtin_inff();
  for (int64_t i = 0; i < count; ++i) {
    if (held == top_k && !(logits[i] > last) && logits[i] == logits[i]) continue;  // of equal ones, this is the later
    const uint64_t rank = rank_of(logits[i], i);
    if (held == top_k && last != last) continue;  // NaN throughout
    int64_t at = held < top_k ? held++ : top_k - 1;
    while (at > 0) {
      const uint64_t above = small ? ranks[at - 1] : rank_of(logits[experts[at - 1]], experts[at - 1]);
      if (above >= rank) break;
      if (small) ranks[at] = above;
      experts[at] = experts[at - 1];
      --at;
    }
    if (small) ranks[at] = rank;
    experts[at] = static_cast<int32_t>(i);
    last = logits[experts[held - 1]];
  }
}

template <typename T>
static void choose(const RouteTopk& a, int64_t token, float* row, float* partial) {
  const T* logits = static_cast<const T*>(a.logits) + token * a.logits_row;
  float* weights = a.weights + token * a.top_k;
  int32_t* experts = a.experts + token * a.top_k;
  widen(row, logits, a.count);
  largest(experts, row, a.count, a.top_k);
  const Softmax softmax = exponentials(row, logits, a.count);
  const V scale = set1(1.0f / softmax.sum);
  float sum = 0.0f;
  for (int64_t k = 0; k < a.top_k; ++k) sum += row[experts[k]];
  if (!a.normalize || softmax.sum != softmax.sum) sum = softmax.sum;
  for (int64_t k = 0; k < a.top_k; ++k) weights[k] = row[experts[k]] / sum;
  for (int64_t i = 0; i < a.count; i += kLanes) {
    store_vector(partial + i, fma(load_vector(row + i), scale, load_vector(partial + i)));
  }
}

template <typename T>
static void differentiate(const RouteTopkBwd& a, int64_t token, float* row) {
  const int64_t padded = rounded_up(a.count, kPartialAlign);
  float* slope = row + padded;  // of what is summed, by probability
  const Softmax softmax = exponentials(row, static_cast<const T*>(a.logits) + token * a.logits_row, a.count);
  const V scale = set1(1.0f / softmax.sum), share = set1(1.0f / static_cast<float>(a.tokens));
  const int32_t* experts = a.experts + token * a.top_k;
  const float* weights = a.weights + token * a.top_k;
  const float* grads = a.grad_weights ? a.grad_weights + token * a.top_k : nullptr;

  memset(slope, 0, padded * sizeof(float));
  if (a.grad_probability) {
    memcpy(slope, a.grad_probability, a.count * sizeof(float));
    for (int64_t i = 0; i < a.count; i += kLanes) store_vector(slope + i, load_vector(slope + i) * share);
  }
  if (grads && !a.normalize) {
    for (int64_t k = 0; k < a.top_k; ++k) slope[experts[k]] += grads[k];
  }
  V total = set1(0.0f);
  for (int64_t i = 0; i < a.count; i += kLanes) {
    const V p = load_vector(row + i) * scale;
    store_vector(row + i, p);
    total = fma(p, load_vector(slope + i), total);
  }
  const V mean = set1(lane_sum(Pair{total, set1(0.0f)}));
  for (int64_t i = 0; i < a.count; i += kLanes) {
    store_vector(row + i, load_vector(row + i) * (load_vector(slope + i) - mean));
  }
  if (grads && a.normalize) {  // a softmax over the chosen alone
    float centre = 0.0f;
    for (int64_t k = 0; k < a.top_k; ++k) centre += grads[k] * weights[k];
    for (int64_t k = 0; k < a.top_k; ++k) row[experts[k]] += weights[k] * (grads[k] - centre);
  }
  narrow(static_cast<T*>(a.grad_logits) + token * a.count, row, 1.0f, a.count);
}

}  // namespace

void route_topk_fwd(const RouteTopk& a) {
  const int64_t padded = rounded_up(a.count, kPartialAlign);
  parallel_ranges(a.blocks, a.tokens * a.count * 16, a.threads, [&](int64_t begin, int64_t end) {
    float* row = a.row + omp_get_thread_num() * padded;
    for (int64_t block = begin; block < end; ++block) {
      float* partial = a.partials + block * padded;
      memset(partial, 0, padded * sizeof(float));
      for (int64_t token = block * a.tokens / a.blocks; token < (block + 1) * a.tokens / a.blocks; ++token) {
        with_dtype(a.dtype, [&](auto tag) { choose<typename decltype(tag)::type>(a, token, row, partial); });
      }
    }
  });
  memset(a.counts, 0, a.count * sizeof(int64_t));
  for (int64_t i = 0; i < a.tokens * a.top_k; ++i) ++a.counts[a.experts[i]];
  const float tokens = static_cast<float>(larger(a.tokens, 1));
  for (int64_t i = 0; i < a.count; ++i) {
    float sum = 0.0f;
    for (int64_t block = 0; block < a.blocks; ++block) sum += a.partials[block * padded + i];
    a.probability[i] = sum / tokens;
  }
}

void route_topk_bwd(const RouteTopkBwd& a) {
  const int64_t padded = rounded_up(a.count, kPartialAlign);
  parallel_ranges(a.tokens, a.tokens * a.count * 16, a.threads, [&](int64_t begin, int64_t end) {
    float* row = a.row + omp_get_thread_num() * 2 * padded;
    for (int64_t token = begin; token < end; ++token) {
      with_dtype(a.dtype, [&](auto tag) { differentiate<typename decltype(tag)::type>(a, token, row); });
    }
  });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
