// grouped_linear: a product for each expert's rows, forward and both gradients.
//
// Three products, by what lies along the sum. Rows of the left operand are read where they lie; the right operand is
// laid out in panels. Along the rows of the weight (forward) the weight is the left one, so that a few tokens cost no
// more than reading it; across them (the gradient of the rows) the tokens are. An element's sum runs in one order
// whatever else there is: its bits depend on its own row and expert alone.
#include "../common/kernels.h"
#include "../common/wide_rows.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int64_t kLane = 64;         // tokens, or columns, of a tile
constexpr int64_t kTileHeight = 96;   // rows of the left operand in a tile: 24 KiB of sums stay in L1
constexpr int64_t kGroupTokens = 256;  // of an expert, that a thread takes at once along the weight's rows
constexpr int64_t kManyTokens = 1024;  // and across them
constexpr int64_t kPanel = 128;       // columns that a thread takes at once across the weight's rows
constexpr int64_t kTokens = 48;       // and tokens of those, of which the sums stay in L1

// The tokens of every expert in groups of at most `size`: what threads share out.
struct Groups {
  struct Group {
    int64_t expert, first, count;
  };
  Group* groups;
  int64_t count = 0;

  Groups(Scratch& scratch, const int64_t* offsets, int64_t experts, int64_t size)
      : groups(scratch.take<Group>(offsets[experts] / size + experts)) {
    if (!scratch.base) return;
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t first = offsets[e]; first < offsets[e + 1]; first += size) {
        groups[count++] = {e, first, smaller(size, offsets[e + 1] - first)};
      }
    }
  }
};

// body(k, steps, first) for each part of a sum over `width` elements.
template <typename Tile, typename T, typename Body>
M4OV_INLINE void each_part(int64_t width, const Body& body) {
  for (int64_t k = 0; k < width; k += kSumPart<T>) {
    body(k, blocks_of(smaller(kSumPart<T>, width - k), Tile::kPair));
  }
}

// A tile of products over the whole width: c [rows][vectors · kLanes], `ldc`; a step of B is `ldb`.
template <typename Tile, typename T>
static void product(float* c, int64_t ldc, const typename Tile::Element* a, int64_t lda,
                    const typename Tile::Element* b, int64_t ldb, int64_t rows, int64_t vectors, int64_t width) {
  each_part<Tile, T>(width, [&](int64_t k, int64_t steps) {
    if (k == 0) {
      multiply<Tile, kZero>(c, ldc, a, lda, b, ldb, rows, vectors, steps);
    } else {
      multiply<Tile, kKeep>(c, ldc, a + k, lda, b + k / Tile::kPair * ldb, ldb, rows, vectors, steps);
    }
  });
}

template <typename Tile, typename T>
struct Grouped {
  using E = typename Tile::Element;
  static constexpr int64_t kPair = Tile::kPair, kStep = kLane * kPair;
  const GroupedLinear& a;
  const int64_t even;  // the width in whole pairs

  explicit Grouped(const GroupedLinear& a) : a(a), even(rounded_up(a.width, kPair)) {}

  struct Mine {
    E *panel, *buffer;
    float *tile, *by_token;
    Mine(Scratch& scratch, const Grouped& work) {
      const GroupedLinear& a = work.a;
      panel = scratch.take<E>((a.across ? kPanel : kGroupTokens) * work.even);
      const int64_t tall = larger(larger(kLane, kTileHeight), kTokens);
      buffer = scratch.take<E>(!kSame<E, T> || work.even != a.width ? larger(tall * work.even, kLane * kPanel) : 0);
      tile = scratch.take<float>(kTileHeight * kLane);
      by_token = scratch.take<float>(kTileHeight * kLane);
      static_assert(kTokens * kPanel <= kTileHeight * kLane, "the sums across rows take the tile");
    }
  };

  WideRows<Tile, T> tokens() const { return {static_cast<const T*>(a.rows), a.row_stride, a.width}; }
  const T* weight(int64_t expert) const { return static_cast<const T*>(a.weight) + expert * a.weight_expert; }

  // Tokens of one group, columns from `begin` to `end`: the weight's rows lie along the sum.
  void along(const Groups::Group& group, int64_t begin, int64_t end, const Mine& mine) const {
    const int64_t blocks = blocks_of(group.count, kLane), block_size = even * kLane;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t lanes = smaller(kLane, group.count - block * kLane);
      const auto view = tokens().view(mine.buffer, group.first + block * kLane, lanes);
      const E* rows[kLane];
      for (int64_t i = 0; i < lanes; ++i) rows[i] = view.rows + i * view.stride;
      pack_columns<Tile>(mine.panel + block * block_size, kStep, rows, lanes, rounded_up(lanes, kLanes), even);
    }
    const WideRows<Tile, T> left{weight(group.expert), a.weight_row, a.width};
    for (int64_t first = begin; first < end; first += kTileHeight) {
      const int64_t height = smaller(kTileHeight, end - first);
      const auto view = left.view(mine.buffer, first, height);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t lanes = smaller(kLane, group.count - block * kLane), vectors = blocks_of(lanes, kLanes);
        const E* right = mine.panel + block * block_size;
        // With few tokens memory is the limit: rows of the weight are read to their end, a few at a time, in its order.
        const int64_t some = vectors > 1 ? height : kTileRows;
        for (int64_t i = 0; i < height; i += some) {
          product<Tile, T>(mine.tile + i * kLane, kLane, view.rows + i * view.stride, view.stride, right, kStep,
                           smaller(some, height - i), vectors, even);
        }
        unpack_columns(mine.by_token, kTileHeight, mine.tile, kLane, lanes, height);
        T* to = static_cast<T*>(a.output) + (group.first + block * kLane) * a.columns + first;
        for (int64_t i = 0; i < lanes; ++i) narrow(to + i * a.columns, mine.by_token + i * kTileHeight, 1.0f, height);
      }
    }
  }

  // Tokens of one group, columns from `begin` on: the weight's rows lie across the sum.
  void across(const Groups::Group& group, int64_t begin, const Mine& mine) const {
    const int64_t count = smaller(kPanel, a.columns - begin), lda = kPanel * kPair;
    const T* base = weight(group.expert) + begin;
    for (int64_t k = 0; k < a.width; k += kLane) {
      const int64_t here = smaller(kLane, a.width - k);
      const E* rows[kLane];
      for (int64_t i = 0; i < here; ++i) {
        if constexpr (kSame<E, T>) {
          rows[i] = base + (k + i) * a.weight_row;
        } else {
          E* wide = mine.buffer + i * kPanel;
          widen(wide, base + (k + i) * a.weight_row, count);
          rows[i] = wide;
        }
      }
      pack_steps<Tile>(mine.panel + k / kPair * lda, lda, rows, here, rounded_up(count, kLanes), count);
    }
    for (int64_t first = 0; first < group.count; first += kTokens) {
      const int64_t height = smaller(kTokens, group.count - first);
      const auto view = tokens().view(mine.buffer, group.first + first, height);
      product<Tile, T>(mine.tile, kPanel, view.rows, view.stride, mine.panel, lda, height, blocks_of(count, kLanes),
                       even);
      T* to = static_cast<T*>(a.output) + (group.first + first) * a.columns + begin;
      for (int64_t i = 0; i < height; ++i) narrow(to + i * a.columns, mine.tile + i * kPanel, 1.0f, count);
    }
  }
};

template <typename Tile, typename T>
static int64_t grouped(const GroupedLinear& a) {
  Scratch scratch{a.scratch};
  const Groups groups(scratch, a.offsets, a.experts, a.across ? kManyTokens : kGroupTokens);
  const Grouped<Tile, T> work(a);
  const int64_t common = scratch.used;
  Scratch one{a.scratch, common};
  typename Grouped<Tile, T>::Mine(one, work);
  const int64_t each = one.used - common;
  if (!a.scratch) return common + each * a.threads;

  // Of few groups the columns are shared out too, so that the threads even out.
  const int64_t most = blocks_of(a.columns, a.across ? kPanel : kTileHeight);
  const int64_t parts = a.across ? most : smaller(most, blocks_of(4 * a.threads, larger(groups.count, 1)));
  const double size = static_cast<double>(a.columns) * static_cast<double>(a.width) *
                      static_cast<double>(larger(a.offsets[a.experts], 16));
  const int team = size < (1 << 22) ? 1 : a.threads;
#pragma omp parallel num_threads(team)
  {
    Scratch rest{a.scratch, common + each * omp_get_thread_num()};
    const typename Grouped<Tile, T>::Mine mine(rest, work);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < groups.count * parts; ++unit) {
      const auto& group = groups.groups[unit / parts];
      const int64_t part = unit % parts;
      if (a.across) {
        work.across(group, part * kPanel, mine);
      } else {
        work.along(group, part * most / parts * kTileHeight,
                   smaller((part + 1) * most / parts * kTileHeight, a.columns), mine);
      }
    }
  }
  return 0;
}

// The gradient of the weight: expert by expert, all threads together, so that one expert with all rows is no worse.
template <typename Tile, typename T>
struct WeightGradient {
  using E = typename Tile::Element;
  static constexpr int64_t kPair = Tile::kPair, kStep = kLane * kPair, kPanels = 4;
  const GroupedLinearWeight& a;
  int64_t padded = 0;  // the most tokens of an expert, in whole pairs
  E *left, *right;     // [columns][tokens]: the gradient; [panels of width][tokens / kPair][kLane][kPair]: the rows

  struct Mine {
    E* buffer;
    float* tile;
    Mine(Scratch& scratch, const WeightGradient& work)
        : buffer(scratch.take<E>(kSame<E, T> ? 0 : kLane * larger(work.a.width, work.a.columns))),
          tile(scratch.take<float>(kTileHeight * kLane)) {}
  };

  WeightGradient(Scratch& scratch, const GroupedLinearWeight& a) : a(a) {
    for (int64_t e = 0; e < a.experts; ++e) padded = larger(padded, a.offsets[e + 1] - a.offsets[e]);
    padded = rounded_up(padded, kPair);
    left = scratch.take<E>(a.columns * padded);
    right = scratch.take<E>(blocks_of(a.width, kLane) * kLane * padded);
  }

  // The tokens from `begin` on, of an expert's `count` from `first` on.
  void lay_out(int64_t first, int64_t count, int64_t begin, const Mine& mine) const {
    const int64_t here = smaller(kLane, count - begin), tokens = rounded_up(count, kPair);
    const auto grad = rows_of(a.grad_output, a.grad_stride, a.columns, first + begin, here, mine);
    pack_transposed<Tile>(left + begin, tokens, grad.rows, grad.stride, here, rounded_up(here, kPair), a.columns);
    const auto rows = rows_of(a.rows, a.row_stride, a.width, first + begin, here, mine);
    const E* from[kLane];
    for (int64_t column = 0; column < a.width; column += kLane) {
      const int64_t width = smaller(kLane, a.width - column);
      for (int64_t i = 0; i < here; ++i) from[i] = rows.rows + i * rows.stride + column;
      pack_steps<Tile>(right + column * tokens + begin * kLane, kStep, from, here, rounded_up(width, kLanes), width);
    }
  }

  struct View {
    const E* rows;
    int64_t stride;
  };
  View rows_of(const void* base, int64_t stride, int64_t width, int64_t first, int64_t count, const Mine& mine) const {
    const T* from = static_cast<const T*>(base) + first * stride;
    if constexpr (kSame<E, T>) {
      return {from, stride};
    } else {
      for (int64_t i = 0; i < count; ++i) widen(mine.buffer + i * width, from + i * stride, width);
      return {mine.buffer, width};
    }
  }

  void write(int64_t expert, int64_t count, int64_t row, int64_t column, const Mine& mine) const {
    const int64_t height = smaller(kTileHeight, a.columns - row), width = smaller(kLane, a.width - column);
    const int64_t tokens = rounded_up(count, kPair);
    product<Tile, T>(mine.tile, kLane, left + row * tokens, tokens, right + column * tokens, kStep, height,
                     blocks_of(width, kLanes), tokens);
    T* to = static_cast<T*>(a.grad_weight) + (expert * a.columns + row) * a.width + column;
    for (int64_t i = 0; i < height; ++i) narrow(to + i * a.width, mine.tile + i * kLane, 1.0f, width);
  }
};

template <typename Tile, typename T>
static int64_t weight_gradient(const GroupedLinearWeight& a) {
  using Work = WeightGradient<Tile, T>;
  Scratch scratch{a.scratch};
  const Work work(scratch, a);
  const int64_t common = scratch.used;
  Scratch one{a.scratch, common};
  typename Work::Mine(one, work);
  const int64_t each = one.used - common;
  if (!a.scratch) return common + each * a.threads;

  const int64_t heights = blocks_of(a.columns, kTileHeight), widths = blocks_of(a.width, kLane * Work::kPanels);
  const double size = static_cast<double>(a.columns) * static_cast<double>(a.width) *
                      static_cast<double>(larger(a.offsets[a.experts], a.experts));
  const int team = size < (1 << 22) ? 1 : a.threads;
#pragma omp parallel num_threads(team)
  {
    Scratch rest{a.scratch, common + each * omp_get_thread_num()};
    const typename Work::Mine mine(rest, work);
    for (int64_t e = 0; e < a.experts; ++e) {
      const int64_t first = a.offsets[e], count = a.offsets[e + 1] - first;
      if (count == 0) {
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < a.columns; ++row) {
          memset(static_cast<T*>(a.grad_weight) + (e * a.columns + row) * a.width, 0, a.width * sizeof(T));
        }
        continue;
      }
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < count; begin += kLane) work.lay_out(first, count, begin, mine);
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < heights * widths; ++unit) {
        const int64_t row = unit / widths * kTileHeight, column = unit % widths * kLane * Work::kPanels;
        for (int64_t at = column; at < smaller(column + kLane * Work::kPanels, a.width); at += kLane) {
          work.write(e, count, row, at, mine);
        }
      }
    }
  }
  return 0;
}

}  // namespace

int64_t grouped_linear(const GroupedLinear& a) {
  int64_t bytes = 0;
  with_tile(a.dtype, [&](auto tile, auto tag) {
    bytes = grouped<typename decltype(tile)::type, typename decltype(tag)::type>(a);
  });
  return bytes;
}

int64_t grouped_linear_weight(const GroupedLinearWeight& a) {
  int64_t bytes = 0;
  with_tile(a.dtype, [&](auto tile, auto tag) {
    bytes = weight_gradient<typename decltype(tile)::type, typename decltype(tag)::type>(a);
  });
  return bytes;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
