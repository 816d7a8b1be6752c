// Two heads side by side: tiles of both's logits for the same words and tokens, and what a divergence is made of.
#pragma once

#include "logits.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr float kLn2 = 0.693147181f;

template <typename Tile, typename T>
struct TwoHeads {
  using E = typename Tile::Element;
  Logits<Tile, T> first, second;

  TwoHeads(Scratch& scratch, const LinearLogprob& a, const LinearLogprob& b) : first(scratch, a), second(scratch, b) {}

  // What a thread needs: room for rows of each, if they are copied, and a tile of each.
  struct Mine {
    E *rows, *more_rows;
    float *tile, *more;
    Mine(Scratch& scratch, const TwoHeads& heads)
        : rows(take_rows(scratch, heads.first)), more_rows(take_rows(scratch, heads.second)),
          tile(scratch.take<float>(kTileWords * kBlockTokens)), more(scratch.take<float>(kTileWords * kBlockTokens)) {}

    static E* take_rows(Scratch& scratch, const Logits<Tile, T>& logits) {
      return scratch.take<E>(larger(logits.weight.buffer_size(kTileWords), logits.hidden.buffer_size(kBlockTokens)));
    }
  };

  void pack(int64_t block, const Mine& mine) const {
    first.pack(block, mine.rows);
    second.pack(block, mine.more_rows);
  }
};

// `x` where the weight is above 0, else 0: an infinite gap of a word without a probability is nothing.
M4OV_INLINE V if_any(V weight, V x) {
  const V zero = set1(0.0f);
  return where_negative(zero - weight, x, zero);
}

// log(1 + e) of 0 ≤ e ≤ 1, as 2 artanh(e / (2 + e)).
M4OV_INLINE V log1p_of_share(V e) {
  const V z = e / (set1(2.0f) + e), square = z * z;
  V series = set1(2.0f / 13);
  series = fma(series, square, set1(2.0f / 11));
  series = fma(series, square, set1(2.0f / 9));
  series = fma(series, square, set1(2.0f / 7));
  series = fma(series, square, set1(2.0f / 5));
  series = fma(series, square, set1(2.0f / 3));
  series = fma(series, square, set1(2.0f));
  return z * series;
}

// Of log p and log q (none below kFarBelow): what the divergence from the mean m of both is made of.
struct Halfway {
  V gap, size, share, log;  // log q - log p, within ±200; its magnitude; e^-size; log(1 + share)
};

M4OV_INLINE Halfway halfway(V log_p, V log_q) {
  const V gap = min(set1(200.0f), max(set1(-200.0f), log_q - log_p)), size = magnitude(gap);
  const V share = exp_full(set1(0.0f) - size);
  return {gap, size, share, log1p_of_share(share)};
}

// log p - log m = log 2 - log(1 + q/p)
M4OV_INLINE V from_first(const Halfway& of) { return set1(kLn2) - max(set1(0.0f), of.gap) - of.log; }

// (KL(p ‖ m) + KL(q ‖ m)) / (p + q) of one word: h tanh h - log cosh h with h = gap / 2. Near 0 its own series is exact.
M4OV_INLINE V from_both(const Halfway& of) {
  const V square = of.size * of.size * set1(0.25f);
  V series = set1(-0.00812463257f);
  series = fma(series, square, set1(0.0196825397f));
  series = fma(series, square, set1(-0.0472222222f));
  series = fma(series, square, set1(0.111111111f));
  series = fma(series, square, set1(-0.25f));
  series = fma(series, square, set1(0.5f));
  const V whole = set1(kLn2) - of.size * (of.share / (set1(1.0f) + of.share)) - of.log;
  return where_negative(of.size - set1(0.7f), series * square, whole);
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
