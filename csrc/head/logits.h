// Tiles of logits: rows of the weight by lanes of tokens, so that a softmax stays within a lane.
//
// A logit is a sum over the hidden dimension in one order, whatever the number of tokens, threads or rows at a time: its
// bits depend on its own hidden state and weight row alone.
#pragma once

#include "../common/pack.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../common/wide_rows.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kBlockTokens = kHeadTokens;  // lanes of a tile
constexpr int64_t kRowsTogether = 48;          // of the weight: kTileRows at a time
constexpr int64_t kTileWords = kHeadTile;      // rows of the weight in a tile: its logits (24 KiB) stay in L1

// Differences of logits stop here: e^x is 0 long before, and a product of the two stays finite.
constexpr float kFarBelow = -1e30f;

// The fp32 hyperbolic tangent, to about two units in the last place.
M4OV_INLINE V tanh_full(V x) {
  // Where |x| is small its own series is exact enough, and 1 - 2 / (e^2x + 1) would cancel.
  const V square = x * x;
  V series = set1(0.0218694885f);
  series = fma(series, square, set1(-0.0539682540f));
  series = fma(series, square, set1(0.133333333f));
  series = fma(series, square, set1(-0.333333333f));
  series = fma(series * square, x, x);
  const V whole = set1(1.0f) - set1(2.0f) / (exp_full(x + x) + set1(1.0f));
  return where_negative(magnitude(x) - set1(0.25f), series, whole);
}

// What every thread reads: the hidden states of each block of tokens as right operand, [width / kPair][64][kPair].
template <typename Tile, typename T>
struct Logits {
  using E = typename Tile::Element;
  static constexpr int64_t kPair = Tile::kPair, kStep = kBlockTokens * kPair;
  const LinearLogprob& a;
  const WideRows<Tile, T> hidden, weight;
  E* packed;

  Logits(Scratch& scratch, const LinearLogprob& a)
      : a(a), hidden{static_cast<const T*>(a.hidden), a.hidden_row, a.dim},
        weight{static_cast<const T*>(a.weight), a.weight_row, a.dim},
        packed(scratch.take<E>(token_blocks() * block_size())) {}

  int64_t token_blocks() const { return blocks_of(a.tokens, kBlockTokens); }
  int64_t block_size() const { return rounded_up(a.dim, kPair) * kBlockTokens; }
  int64_t lanes(int64_t block) const { return smaller(kBlockTokens, a.tokens - block * kBlockTokens); }
  int64_t vectors(int64_t block) const { return blocks_of(lanes(block), kLanes); }

  // `buffer`: hidden.buffer_size(kBlockTokens) elements.
  void pack(int64_t block, E* buffer) const {
    const auto view = hidden.view(buffer, block * kBlockTokens, lanes(block));
    const E* rows[kBlockTokens];
    for (int64_t i = 0; i < lanes(block); ++i) rows[i] = view.rows + i * view.stride;
    pack_columns<Tile>(packed + block * block_size(), kStep, rows, lanes(block), vectors(block) * kLanes,
                       hidden.width());
  }

  // tile [count][64]: the products, with nothing done to them. Some rows at a time, so that in fp32, whose sums have many
  // parts, what they are added to stays in L1 with the part of the hidden states that they share; and the next rows are
  // on their way from the outer caches while one tile is made.
  void multiply_block(float* tile, const typename WideRows<Tile, T>::View& rows, int64_t count, int64_t block) const {
    const E* right = packed + block * block_size();
    const int64_t width = hidden.width(), columns = vectors(block);
    for (int64_t first = 0; first < count; first += kRowsTogether) {
      const int64_t last = smaller(first + kRowsTogether, count);
      for (int64_t k = 0; k < width; k += kSumPart<T>) {
        const int64_t part = smaller(kSumPart<T>, width - k), next = k + part < width ? k + part : 0;
        const E* panel = right + k / kPair * kStep;
        for (int64_t i = first; i < last; i += kTileRows) {
          const bool more = i + kTileRows < last;
          fetch(rows.rows + (more ? i + kTileRows : next ? first : last) * rows.stride + (more ? k : next), rows.stride,
                part);
          const E* left = rows.rows + i * rows.stride + k;
          const int64_t height = smaller(kTileRows, last - i);
          float* to = tile + i * kBlockTokens;
          if (k == 0) {
            multiply<Tile, kZero>(to, kBlockTokens, left, rows.stride, panel, kStep, height, columns, part / kPair);
          } else {
            multiply<Tile, kKeep>(to, kBlockTokens, left, rows.stride, panel, kStep, height, columns, part / kPair);
          }
        }
      }
    }
  }

  static void fetch(const E* rows, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const char* row = reinterpret_cast<const char*>(rows + i * stride);
      for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(E)); at += 64) _mm_prefetch(row + at, _MM_HINT_T0);
    }
  }

  // The logits of a tile: computed, or those that were kept.
  void make(float* tile, const typename WideRows<Tile, T>::View& rows, int64_t first, int64_t count, int64_t block) const {
    multiply_block(tile, rows, count, block);
    finish(tile, first, count, block);
  }

  bool kept(int64_t first) const { return first < a.kept_rows; }
  int64_t kept_stride() const { return token_blocks() * kBlockTokens; }
  bool kept_narrow() const { return a.rounded && a.softcap == 0.0f; }

  // With zeros where there is no token.
  void keep(const float* tile, int64_t first, int64_t count, int64_t block) const {
    const int64_t there = lanes(block), rest = kBlockTokens - there;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) * kept_stride() + block * kBlockTokens;
      if (kept_narrow()) {
        T* to = static_cast<T*>(a.kept) + at;
        narrow(to, tile + i * kBlockTokens, 1.0f, there);
        memset(to + there, 0, rest * sizeof(T));
      } else {
        float* to = static_cast<float*>(a.kept) + at;
        memcpy(to, tile + i * kBlockTokens, there * sizeof(float));
        memset(to + there, 0, rest * sizeof(float));
      }
    }
  }
  void load_kept(float* tile, int64_t first, int64_t count, int64_t block) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) * kept_stride() + block * kBlockTokens;
      if (kept_narrow()) {
        widen(tile + i * kBlockTokens, static_cast<const T*>(a.kept) + at, vectors(block) * kLanes);
      } else {
        memcpy(tile + i * kBlockTokens, static_cast<const float*>(a.kept) + at, vectors(block) * kVectorBytes);
      }
    }
  }

  bool plain() const { return !a.bias && !a.rounded && a.temperature == 1.0f && a.softcap == 0.0f; }

  // The products become logits. `first`: the tile's first row of this weight.
  void finish(float* tile, int64_t first, int64_t count, int64_t block) const {
    if (plain()) return;
    const V temperature = set1(a.temperature), cap = set1(a.softcap);
    for (int64_t i = 0; i < count; ++i) {
      V bias = set1(0.0f);
      if (a.bias) bias = set1(lane_first(load_tail(static_cast<const T*>(a.bias) + first + i, 1)));
      for (int64_t j = 0; j < vectors(block); ++j) {
        float* at = tile + i * kBlockTokens + j * kLanes;
        V x = load_vector(at) + bias;
        if (a.rounded) x = round_to<T>(x);
        if (a.temperature != 1.0f) {
          x = x / temperature;
          if (a.rounded) x = round_to<T>(x);
        }
        if (a.softcap != 0.0f) x = cap * tanh_full(x / cap);
        store_vector(at, x);
      }
    }
  }

  static float lane_first(Pair x) { return lane_sum(x); }  // every other lane is zero
};

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
