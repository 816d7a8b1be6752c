// A linear layer whose rows keep their bits in any batch: the head's tiles of logits, written out.
//
// Rows of the weight are the left operand, where they lie: one token costs no more than reading the weight once.
#include "../head/logits.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

template <typename Tile, typename T>
struct Linear {
  using E = typename Tile::Element;
  static constexpr int64_t kPair = Tile::kPair;
  const InvariantLinear& a;
  const Logits<Tile, T> logits;

  struct Mine {
    E *rows, *wide;
    float *tile, *by_token;
    Mine(Scratch& scratch, const Linear& work) {
      const int64_t width = rounded_up(work.a.width, kPair);
      const int64_t left = work.a.transposed ? kTileWords * width : work.logits.weight.buffer_size(kTileWords);
      rows = scratch.take<E>(larger(left, work.logits.hidden.buffer_size(kBlockTokens)));
      wide = scratch.take<E>(work.a.transposed && !kSame<E, T> ? kTileWords * work.a.width : 0);
      tile = scratch.take<float>(kTileWords * kBlockTokens);
      by_token = scratch.take<float>(kTileWords * kBlockTokens);
    }
  };

  // Rows of the weight, or columns of it transposed, from `first` on.
  typename WideRows<Tile, T>::View left(const Mine& mine, int64_t first, int64_t count) const {
    if (!a.transposed) return logits.weight.view(mine.rows, first, count);
    const int64_t width = rounded_up(a.width, kPair);
    const T* from = static_cast<const T*>(a.weight) + first;
    if constexpr (kSame<E, T>) {
      pack_transposed<Tile>(mine.rows, width, from, a.weight_row, a.width, width, count);
    } else {
      for (int64_t k = 0; k < a.width; ++k) widen(mine.wide + k * count, from + k * a.weight_row, count);
      pack_transposed<Tile>(mine.rows, width, mine.wide, count, a.width, width, count);
    }
    return {mine.rows, width};
  }

  // The head's tile. For few tokens, whose time goes into reading the weight, a few of its rows at a time to their end:
  // the same sums, and memory is read in order.
  void make(float* tile, const typename WideRows<Tile, T>::View& rows, int64_t first, int64_t count, int64_t block) const {
    if (logits.vectors(block) > 1) return logits.make(tile, rows, first, count, block);
    for (int64_t i = 0; i < count; i += kTileRows) {
      const typename WideRows<Tile, T>::View some{rows.rows + i * rows.stride, rows.stride};
      logits.multiply_block(tile + i * kBlockTokens, some, smaller(kTileRows, count - i), block);
    }
    logits.finish(tile, first, count, block);
  }

  void run_tile(int64_t first, int64_t begin, int64_t end, const Mine& mine) const {
    const int64_t count = smaller(kTileWords, a.columns - first);
    const auto rows = left(mine, first, count);
    for (int64_t block = begin; block < end; ++block) {
      make(mine.tile, rows, first, count, block);
      T* to = static_cast<T*>(a.output) + block * kBlockTokens * a.columns + first;
      if constexpr (kSame<T, float>) {
        unpack_columns(to, a.columns, mine.tile, kBlockTokens, logits.lanes(block), count);
        continue;
      }
      unpack_columns(mine.by_token, kTileWords, mine.tile, kBlockTokens, logits.lanes(block), count);
      for (int64_t i = 0; i < logits.lanes(block); ++i) {
        narrow(to + i * a.columns, mine.by_token + i * kTileWords, 1.0f, count);
      }
    }
  }
};

// Returns the bytes of scratch memory that it needs; does nothing else when there is none.
template <typename Tile, typename T>
static int64_t linear(const InvariantLinear& a) {
  LinearLogprob head{};  // no more of it than its logits
  head.hidden = a.input;
  head.weight = a.weight;
  head.bias = a.bias;
  head.tokens = a.tokens;
  head.vocab = a.columns;
  head.dim = a.width;
  head.hidden_row = a.input_row;
  head.weight_row = a.weight_row;
  head.temperature = 1.0f;
  Scratch scratch{a.scratch};
  const Linear<Tile, T> work{a, Logits<Tile, T>(scratch, head)};
  const int64_t common = scratch.used;
  Scratch one{a.scratch, common};
  typename Linear<Tile, T>::Mine(one, work);
  const int64_t each = one.used - common;
  if (!a.scratch) return common + each * a.threads;

  const int64_t blocks = work.logits.token_blocks(), tiles = blocks_of(a.columns, kTileWords);
  // Enough units for the threads to even out; a thread for about every 100 µs of one core's work, and where memory is
  // what bounds it, as many as there are.
  const int64_t splits = smaller(blocks, larger(1, blocks_of(4 * a.threads, tiles)));
  const double work_size = static_cast<double>(a.columns) * static_cast<double>(a.width) *
                           static_cast<double>(larger(a.tokens, 16));
  const int team = work_size < (1 << 22) ? 1 : a.threads;
#pragma omp parallel num_threads(team)
  {
    Scratch rest{a.scratch, common + each * omp_get_thread_num()};
    const typename Linear<Tile, T>::Mine mine(rest, work);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) work.logits.pack(block, mine.rows);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < tiles * splits; ++unit) {
      const int64_t split = unit % splits;
      work.run_tile(unit / splits * kTileWords, split * blocks / splits, (split + 1) * blocks / splits, mine);
    }
  }
  return 0;
}

}  // namespace

int64_t invariant_linear(const InvariantLinear& a) {
  int64_t bytes = 0;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
#ifdef __AVX512BF16__
    if constexpr (kSame<T, Bf16>) {
      bytes = linear<DotTile, T>(a);
      return;
    }
#endif
    bytes = linear<FmaTile, T>(a);
  });
  return bytes;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
