// Backward: over chunks of the vocabulary: logits again, their gradient, and from it the chunk's rows of the weight's
// gradient, written once, and a contribution to the hidden states', summed in fp32.
#pragma once

#include "logits.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kPanel = 64;       // hidden columns of a tile of the weight's gradient
constexpr int64_t kTokenPart = 512;  // tokens that are summed by themselves

template <typename Tile, typename T>
struct Backward {
  using E = typename Tile::Element;
  static constexpr int64_t kPair = Tile::kPair, kStep = kBlockTokens * kPair;
  const LinearLogprobBwd& a;
  const LinearLogprob& shared;
  Logits<Tile, T> logits;
  int64_t blocks, padded, tiles;  // of tokens; tokens in whole blocks; tiles of the weight in a chunk
  float* coefficients;            // [kHeadCoefficients][padded]
  E* transposed;                  // [dim][columns]: the chunk of the weight
  E* pairs;                       // [blocks][columns / kPair][64][kPair]: the gradient of logits, as right operand
  E* rows;                        // [columns][padded]: the same, as left operand
  E* hidden_steps;                // [panels][padded / kPair][kPanel][kPair]
  float* hidden_sums;             // [blocks][dim][64]
  float* bias_parts;              // [columns][blocks]

  struct Mine {
    E* buffer;
    float* tile;
    Mine(Scratch& scratch, const Backward& work)
        : buffer(scratch.take<E>(
              larger(work.logits.weight.buffer_size(kTileWords), kBlockTokens * work.logits.hidden.width()))),
          tile(scratch.take<float>(kTileWords * kBlockTokens)) {}
  };

  Backward(Scratch& scratch, const LinearLogprobBwd& a)
      : a(a), shared(a.shared), logits(scratch, a.shared), blocks(logits.token_blocks()),
        padded(blocks * kBlockTokens), tiles(a.columns / kTileWords),
        coefficients(scratch.take<float>(kHeadCoefficients * padded)),
        transposed(scratch.take<E>(a.grad_hidden ? shared.dim * a.columns : 0)),
        pairs(scratch.take<E>(a.grad_hidden ? padded * a.columns : 0)),
        rows(scratch.take<E>(a.grad_weight ? padded * a.columns : 0)),
        hidden_steps(scratch.take<E>(a.grad_weight ? panels() * panel_size() : 0)),
        hidden_sums(scratch.take<float>(a.grad_hidden ? padded * shared.dim : 0)),
        bias_parts(scratch.take<float>(a.grad_bias ? a.columns * blocks : 0)) {}

  int64_t panels() const { return blocks_of(shared.dim, kPanel); }
  int64_t panel_size() const { return padded * kPanel; }

  void pack(int64_t block, const Mine& mine) const { logits.pack(block, mine.buffer); }

  // Coefficients of a block of tokens, and zeros.
  void pad_coefficients(int64_t block) const {
    for (int64_t lane = 0; lane < kBlockTokens; ++lane) {
      const int64_t token = block * kBlockTokens + lane;
      for (int which = 0; which < kHeadCoefficients; ++which) {
        const bool there = token < shared.tokens;
        coefficients[which * padded + token] = there ? canonical(a.coefficients[which * shared.tokens + token]) : 0.0f;
      }
    }
  }

  void pack_hidden_steps(int64_t block, E* buffer) const {
    const auto view = logits.hidden.view(buffer, block * kBlockTokens, logits.lanes(block));
    const E* from[kBlockTokens];
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const int64_t column = panel * kPanel, width = smaller(kPanel, shared.dim - column);
      for (int64_t i = 0; i < logits.lanes(block); ++i) from[i] = view.rows + i * view.stride + column;
      pack_steps<Tile>(hidden_steps + panel * panel_size() + block * kBlockTokens * kPanel, kPanel * kPair, from,
                       logits.lanes(block), rounded_up(width, kLanes), width);
    }
  }

  template <bool kGeneral>
  void differentiate(float* tile, int64_t first, int64_t count, int64_t block) const {
    const float* c = coefficients + block * kBlockTokens;
    const V far = set1(kFarBelow), one = set1(1.0f);
    const bool capped = shared.softcap != 0.0f;
    const V per_cap = set1(capped ? 1.0f / shared.softcap : 0.0f);
    for (int64_t j = 0; j < logits.vectors(block); ++j) {
      const V shift = load_vector(c + kShift * padded + j * kLanes), log_sum = load_vector(c + kLogSum * padded + j * kLanes);
      const V constant = load_vector(c + kConstant * padded + j * kLanes);
      const V linear = load_vector(c + kLinear * padded + j * kLanes);
      const V uniform = load_vector(c + kUniform * padded + j * kLanes);
      for (int64_t i = 0; i < count; ++i) {
        float* at = tile + i * kBlockTokens + j * kLanes;
        const V x = load_vector(at);
        // Two steps: log p is small where p is large, and keeps its precision there.
        const V log_p = x - shift - log_sum;
        V g;
        if constexpr (kGeneral) {
          g = exp_for<T>(log_p) * fma(linear, max(far, log_p), constant);
          g = g + (shared.class_weight ? uniform * set1(shared.class_weight[first + i]) : uniform);
          if (capped) {
            const V t = x * per_cap;
            g = g * (one - t * t);
          }
        } else {
          g = exp_for<T>(log_p) * constant;
        }
        store_vector(at, g);
      }
    }
  }

  // The gradient at the target cancels, p - 1: it takes expm1.
  float at_target(float x, int64_t token, int64_t row) const {
    const float* c = coefficients + token;
    const float log_p = x - c[kShift * padded] - c[kLogSum * padded];
    const float hit = c[kHit * padded], linear = c[kLinear * padded], p = __builtin_expf(log_p);
    float g = (c[kConstant * padded] + hit) * p - hit * __builtin_expm1f(log_p);
    if (linear != 0.0f) g += linear * (log_p < kFarBelow ? kFarBelow : log_p) * p;
    g += c[kUniform * padded] * (shared.class_weight ? shared.class_weight[row] : 1.0f);
    const float t = shared.softcap != 0.0f ? x / shared.softcap : 0.0f;
    return g * (1.0f - t * t);
  }

  // A tile's logits become their gradient. `first`: its row in the chunk, which begins at `chunk`.
  void add_tile(float* tile, int64_t chunk, int64_t first, int64_t count, int64_t block, bool general) const {
    float hits[kBlockTokens];
    const int64_t* target = shared.target + block * kBlockTokens;
    const int64_t number = shared.first + chunk + first, lanes = logits.lanes(block);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t hit = target[lane] - number;
      if (hit < 0 || hit >= count) continue;
      hits[lane] = at_target(tile[hit * kBlockTokens + lane], block * kBlockTokens + lane, chunk + first + hit);
    }
    general ? differentiate<true>(tile, chunk + first, count, block)
            : differentiate<false>(tile, chunk + first, count, block);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t hit = target[lane] - number;
      if (hit >= 0 && hit < count) tile[hit * kBlockTokens + lane] = hits[lane];
    }
    lay_out(tile, first, count, block);
  }

  // A tile of the logits' gradient, in the layouts of the products to come. `first`: its row in the chunk.
  void lay_out(float* tile, int64_t first, int64_t count, int64_t block) const {
    const int64_t lanes = logits.lanes(block), vectors = logits.vectors(block);
    for (int64_t i = 0; i < count && lanes < vectors * kLanes; ++i) {  // of an infinite weight, 0 · inf stands there
      memset(tile + i * kBlockTokens + lanes, 0, (vectors * kLanes - lanes) * sizeof(float));
    }
    if (a.grad_hidden) {
      E* to = pairs + block * kBlockTokens * a.columns + first * kBlockTokens;
      for (int64_t i = 0; i < count; i += kPair) {
        for (int64_t j = 0; j < vectors; ++j) {
          const float* from = tile + i * kBlockTokens + j * kLanes;
          const V odd = i + 1 < count ? load_vector(from + kBlockTokens) : set1(0.0f);
          put_pairs(to + i * kBlockTokens + j * kLanes * kPair, load_vector(from), odd);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* from = tile + i * kBlockTokens;
      if (a.grad_weight) {
        E* to = rows + (first + i) * padded + block * kBlockTokens;
        for (int64_t j = 0; j < vectors; ++j) put_row(to + j * kLanes, load_vector(from + j * kLanes));
      }
      if (a.grad_bias) {
        V sum = set1(0.0f);
        for (int64_t j = 0; j < vectors; ++j) sum = sum + load_vector(from + j * kLanes);
        bias_parts[(first + i) * blocks + block] = lane_sum(sum);
      }
    }
  }

  // Rows of the chunk, from `first` on, as left operand of the hidden states' gradient.
  void transpose_weight(const typename WideRows<Tile, T>::View& view, int64_t first, int64_t count) const {
    if (!a.grad_hidden) return;
    pack_transposed<Tile>(transposed + first, a.columns, view.rows, view.stride, count, rounded_up(count, kPair),
                          shared.dim);
  }

  // Logits of one tile of the chunk for the blocks of tokens from `begin` to `end`.
  void run_tile(int64_t chunk, int64_t tile, int64_t columns, int64_t begin, int64_t end, bool general,
                const Mine& mine) const {
    const int64_t first = tile * kTileWords, count = smaller(kTileWords, columns - first);
    const auto view = logits.weight.view(mine.buffer, chunk + first, count);
    if (begin == 0) transpose_weight(view, first, count);
    for (int64_t block = begin; block < end; ++block) {
      if (logits.kept(chunk + first)) {
        logits.load_kept(mine.tile, chunk + first, count, block);
      } else {
        logits.make(mine.tile, view, chunk + first, count, block);
      }
      add_tile(mine.tile, chunk, first, count, block, general);
    }
  }

  // hidden_sums of one block of tokens and the hidden columns from `begin` to `end`.
  void add_hidden(int64_t chunk, int64_t columns, int64_t block, int64_t begin, int64_t end) const {
    float* sums = hidden_sums + (block * shared.dim + begin) * kBlockTokens;
    const E* left = transposed + begin * a.columns;
    const E* right = pairs + block * kBlockTokens * a.columns;
    const int64_t vectors = logits.vectors(block);
    for (int64_t k = 0; k < columns; k += kHeadColumns) {
      const int64_t steps = blocks_of(smaller(kHeadColumns, columns - k), kPair);
      if (chunk == 0 && k == 0) {
        multiply<Tile, kZero>(sums, kBlockTokens, left, a.columns, right, kStep, end - begin, vectors, steps);
      } else {
        multiply<Tile, kKeep>(sums, kBlockTokens, left + k, a.columns, right + k / kPair * kStep, kStep, end - begin,
                              vectors, steps);
      }
    }
  }

  // One tile of the weight's gradient, one panel of hidden columns.
  void write_weight(int64_t chunk, int64_t tile, int64_t columns, int64_t panel, float* sums) const {
    const int64_t first = tile * kTileWords, count = smaller(kTileWords, columns - first);
    const int64_t column = panel * kPanel, width = smaller(kPanel, shared.dim - column);
    const int64_t vectors = blocks_of(width, kLanes);
    const E* left = rows + first * padded;
    const E* right = hidden_steps + panel * panel_size();
    for (int64_t k = 0; k < shared.tokens; k += kTokenPart) {
      const int64_t steps = blocks_of(smaller(kTokenPart, shared.tokens - k), kPair);
      if (k == 0) {
        multiply<Tile, kZero>(sums, kPanel, left, padded, right, kPanel * kPair, count, vectors, steps);
      } else {
        multiply<Tile, kKeep>(sums, kPanel, left + k, padded, right + k * kPanel, kPanel * kPair, count, vectors, steps);
      }
    }
    T* to = static_cast<T*>(a.grad_weight) + (chunk + first) * shared.dim + column;
    for (int64_t i = 0; i < count; ++i) narrow(to + i * shared.dim, sums + i * kPanel, 1.0f, width);
  }

  void write_bias(int64_t chunk, int64_t columns) const {
    T* to = static_cast<T*>(a.grad_bias) + chunk;
    for (int64_t i = 0; i < columns; ++i) {
      float sum = 0.0f;
      for (int64_t block = 0; block < blocks; ++block) sum += bias_parts[i * blocks + block];
      narrow(to + i, &sum, 1.0f, 1);
    }
  }

  void write_hidden(int64_t block, float* buffer) const {
    const float* sums = hidden_sums + block * shared.dim * kBlockTokens;
    T* to = static_cast<T*>(a.grad_hidden) + block * kBlockTokens * shared.dim;
    for (int64_t column = 0; column < shared.dim; column += kPanel) {
      const int64_t width = smaller(kPanel, shared.dim - column);
      unpack_columns(buffer, kPanel, sums + column * kBlockTokens, kBlockTokens, logits.lanes(block), width);
      for (int64_t i = 0; i < logits.lanes(block); ++i) {
        narrow(to + i * shared.dim + column, buffer + i * kPanel, 1.0f, width);
      }
    }
  }

  // Whether the gradient is more than p · constant and the target's.
  bool general() const {
    bool found = shared.softcap != 0.0f;
    for (int64_t i = 0; i < shared.tokens && !found; ++i) {
      found = a.coefficients[kLinear * shared.tokens + i] != 0.0f || a.coefficients[kUniform * shared.tokens + i] != 0.0f;
    }
    return found;
  }
};

// `Work`: a Backward, or what makes another gradient of its logits. Returns the bytes of scratch memory that it needs;
// does nothing else when there is none.
template <typename Work, typename Arguments>
static int64_t backward(const Arguments& arguments, const LinearLogprobBwd& a) {
  const LinearLogprob& shared = a.shared;
  Scratch scratch{shared.scratch};
  const Work work(scratch, arguments);
  const int64_t common = scratch.used;
  Scratch one{shared.scratch, common};
  typename Work::Mine(one, work);
  const int64_t each = one.used - common;
  if (!shared.scratch) return common + each * shared.threads;

  const bool general = work.general();
  const int64_t blocks = work.blocks, dim_units = blocks_of(shared.dim, kTileWords);
  // Enough units of each kind for the threads to even out.
  const int64_t splits = smaller(blocks, larger(1, blocks_of(8 * shared.threads, work.tiles)));
#pragma omp parallel num_threads(shared.threads)
  {
    Scratch rest{shared.scratch, common + each * omp_get_thread_num()};
    const typename Work::Mine mine(rest, work);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      work.pack(block, mine);
      work.pad_coefficients(block);
      if (a.grad_weight) work.pack_hidden_steps(block, mine.buffer);
    }
    for (int64_t chunk = 0; chunk < shared.vocab; chunk += a.columns) {
      const int64_t columns = smaller(a.columns, shared.vocab - chunk), tiles = blocks_of(columns, kTileWords);
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < tiles * splits; ++unit) {
        const int64_t split = unit % splits;
        work.run_tile(chunk, unit / splits, columns, split * blocks / splits, (split + 1) * blocks / splits, general,
                      mine);
      }
      const int64_t hidden_units = a.grad_hidden ? blocks * dim_units : 0;
      const int64_t weight_units = a.grad_weight ? tiles * work.panels() : 0;
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < hidden_units + weight_units + 1; ++unit) {
        if (unit < hidden_units) {
          const int64_t begin = unit % dim_units * kTileWords;
          work.add_hidden(chunk, columns, unit / dim_units, begin, smaller(begin + kTileWords, shared.dim));
        } else if (unit < hidden_units + weight_units) {
          const int64_t rest_unit = unit - hidden_units;
          work.write_weight(chunk, rest_unit / work.panels(), columns, rest_unit % work.panels(), mine.tile);
        } else if (a.grad_bias) {
          work.write_bias(chunk, columns);
        }
      }
    }
    if (a.grad_hidden) {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) work.write_hidden(block, mine.tile);
    }
  }
  return 0;
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
