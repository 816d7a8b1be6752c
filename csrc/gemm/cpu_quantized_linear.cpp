// Linear layers with quantised weights: int4 and fp8 by an input in bf16 or e4m3, int4 and int8 by one in int8.
#include "../activation/functions.h"
#include "quantized_few.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

// At most so many rows pass by an unpacked segment: their sums (64 KiB, twice that for gates and ups) stay in L2.
constexpr int64_t kBlockRows = 256;

template <typename Tile, QuantizedKind kKind, typename T>
struct Product {
  static constexpr bool kBytes = kSame<Tile, BytesTile>;
  using E = typename Tile::Element;
  using Right = std::conditional_t<kBytes, uint8_t, E>;
  using Left = Input<Tile, kKind, T>;
  const QuantizedLinear& a;
  const Left left;

  struct Mine {
    Right* right;
    float *sums, *more_sums, *tile, *scale, *wide;
    Mine(Scratch& scratch, const Product& work) {
      const int64_t rows = smaller(work.a.tokens, kBlockRows);
      right = scratch.take<Right>(kBytes && kKind == kInt8 ? 0 : kPanel * Left::kPlaces);
      sums = scratch.take<float>(rows * kPanel);
      more_sums = scratch.take<float>(work.gated() ? rows * kPanel : 0);
      tile = scratch.take<float>(kTileRows * kPanel);
      scale = scratch.take<float>(kPanel);
      wide = scratch.take<float>(work.left.wide_size());
    }
  };

  bool gated() const { return a.epilogue == kSwiglu; }
  int64_t outputs() const { return gated() ? a.columns / 2 : a.columns; }
  const uint8_t* codes(int64_t panel, int64_t place) const {
    return a.codes + (panel * a.places + place) / kStepPlaces<kKind> * kStepBytes<kKind>;
  }

  // sums [rows][64] = the products of rows with a panel; after(begin, count) of them, as soon as they are whole: results
  // go to memory while the next rows are multiplied.
  template <typename After>
  void multiply_panel(float* sums, int64_t panel, int64_t first, int64_t rows, const Mine& mine, const After& after) const {
#ifdef __AVX512BF16__
    if constexpr (kSame<Tile, DotTile>) {
      if (a.tokens <= kFewRows && !left.by_group()) {
        if (kKind == kInt4 && a.zeros) {
          few_rows<kKind, kKind == kInt4>(sums, left, panel, codes(panel, 0));
        } else {
          few_rows<kKind, false>(sums, left, panel, codes(panel, 0));
        }
        return after(0, rows);
      }
    }
#endif
    memset(sums, 0, rows * kPanel * sizeof(float));
    int64_t index = 0, scaled = -1;
    for (int64_t begin = 0; begin < a.places; ++index) {
      const Segment segment = segment_at<Left::kPlaces>(a, begin);
      const uint8_t* zeros = a.zeros ? a.zeros + (panel * a.groups + segment.group) * kPanel : nullptr;
      const Right* right = unpack<Tile, kKind>(mine.right, codes(panel, begin), zeros, segment.count);
      if (segment.group != scaled) widen_scales(mine.scale, a, panel, segment.group);
      scaled = segment.group;
      begin += segment.count;
      if (begin < a.places) {
        multiply_rows(sums, segment, index, first, rows, right, mine, [](int64_t, int64_t) {});
      } else {
        multiply_rows(sums, segment, index, first, rows, right, mine, after);
      }
    }
  }

  // Tiles as even as can be: the smaller, the more of its time goes into reading the right operand.
  template <typename After>
  void multiply_rows(float* sums, const Segment& segment, int64_t index, int64_t first, int64_t rows, const Right* right,
                     const Mine& mine, const After& after) const {
    const int64_t tiles = blocks_of(rows, kTileRows);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = i * rows / tiles, count = (i + 1) * rows / tiles - begin;
      float* c = sums + begin * kPanel;
      const E* rows_of_left = left.rows(segment, first + begin);
      if constexpr (kBytes) {
#ifdef __AVX512VNNI__
        const int32_t* start = left.starts + index * a.tokens + first + begin;
        // Codes that are multiplied where they lie: the first tiles fetch those of the next segment, four steps a line.
        const int64_t steps = segment.count / 4, read = i * steps * 64;
        const bool more = kKind == kInt8 && read < segment.count * kPanel;
        const uint8_t* next = more ? right + segment.count * kPanel + read : right;
        bytes_tile(c, kPanel, rows_of_left, segment.count, right, count, steps, start, mine.scale, next, more ? 64 : 0);
#endif
      } else if (left.by_group()) {
        multiply<Tile, kZero>(mine.tile, kPanel, rows_of_left, segment.count, right, kPanel * Tile::kPair, count,
                              kPanel / kLanes, segment.count / Tile::kPair);
        for (int64_t j = 0; j < count; ++j) {
          add_scaled(c + j * kPanel, mine.tile + j * kPanel, mine.scale,
                     left.scales[(first + begin + j) * a.groups + segment.group]);
        }
      } else {
        multiply<Tile, kAddScaled>(c, kPanel, rows_of_left, segment.count, right, kPanel * Tile::kPair, count,
                                   kPanel / kLanes, segment.count / Tile::kPair, mine.scale);
      }
      after(begin, count);
    }
  }

  static void add_scaled(float* sums, const float* more, const float* scale, float factor) {
    for (int64_t j = 0; j < kPanel; j += kLanes) {
      const V product = load_vector(more + j) * load_vector(scale + j);
      store_vector(sums + j, fma(product, set1(factor), load_vector(sums + j)));
    }
  }

  template <typename Body>
  static void activate_all(float* to, const float* from, const Body& body) {
    for (int64_t j = 0; j < kPanel; j += kLanes) store_vector(to + j, body(load_vector(from + j)));
  }
  float factor(int64_t token) const { return left.scaled() && !left.by_group() ? left.scales[token] : 1.0f; }
  static void rescale(float* sums, float factor, const float* bias) {
    for (int64_t j = 0; j < kPanel; j += kLanes) {
      const V sum = load_vector(sums + j) * set1(factor);
      store_vector(sums + j, bias ? sum + load_vector(bias + j) : sum);
    }
  }

  // What follows the products, for one row of a panel, or of one of gates and one of ups.
  void finish(float* sums, float* ups, const float* bias, const float* up_bias, int64_t token, int64_t column,
              int64_t count) const {
    T* to = static_cast<T*>(a.output) + token * outputs() + column;
    if (!bias && !a.residual && a.epilogue == kNothing) return narrow(to, sums, factor(token), count);
    rescale(sums, factor(token), bias);
    if (a.epilogue == kSwiglu) {
      rescale(ups, factor(token), up_bias);
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        store_vector(sums + j, activate<T, kSilu>(load_vector(sums + j)) * load_vector(ups + j));
      }
    } else if (a.epilogue == kGelu) {
      activate_all(sums, sums, [](V x) { return activate<T, kGeluErf>(x); });
    } else if (a.epilogue == kGeluByTanh) {
      activate_all(sums, sums, [](V x) { return activate<T, kGeluTanh>(x); });
    }
    if (a.residual) {
      float more[kPanel] = {};
      widen(more, static_cast<const T*>(a.residual) + token * a.residual_row + column, count);
      for (int64_t j = 0; j < kPanel; j += kLanes) store_vector(sums + j, load_vector(sums + j) + load_vector(more + j));
    }
    narrow(to, sums, 1.0f, count);
  }

  void run_unit(int64_t panel, int64_t first, int64_t rows, const Mine& mine) const {
    const int64_t column = panel * kPanel, count = smaller(kPanel, outputs() - column);
    float bias[2][kPanel] = {};
    if (a.bias) {
      widen(bias[0], static_cast<const T*>(a.bias) + column, count);
      if (gated()) widen(bias[1], static_cast<const T*>(a.bias) + outputs() + column, count);
    }
    const auto finish_rows = [&](int64_t begin, int64_t rows) {
      for (int64_t i = begin; i < begin + rows; ++i) {
        finish(mine.sums + i * kPanel, mine.more_sums + i * kPanel, a.bias ? bias[0] : nullptr, a.bias ? bias[1] : nullptr,
               first + i, column, count);
      }
    };
    if (gated()) {
      multiply_panel(mine.sums, 2 * panel, first, rows, mine, [](int64_t, int64_t) {});
      multiply_panel(mine.more_sums, 2 * panel + 1, first, rows, mine, finish_rows);
    } else {
      multiply_panel(mine.sums, panel, first, rows, mine, finish_rows);
    }
  }
};

// Returns the bytes of scratch memory that it needs; does nothing else when there is none.
template <typename Tile, QuantizedKind kKind, typename T>
static int64_t quantized(const QuantizedLinear& a) {
  using Work = Product<Tile, kKind, T>;
  Scratch scratch{a.scratch};
  const Work work{a, Input<Tile, kKind, T>(scratch, a)};
  const int64_t common = scratch.used;
  Scratch one{a.scratch, common};
  typename Work::Mine(one, work);
  const int64_t each = one.used - common;
  if (!a.scratch) return common + each * a.threads;

  const int64_t panels = blocks_of(work.outputs(), kPanel), blocks = blocks_of(a.tokens, kBlockRows);
  const double size = static_cast<double>(a.columns) * static_cast<double>(a.width) *
                      static_cast<double>(larger(a.tokens, 16));
  const int team = size < (1 << 22) ? 1 : a.threads;
#pragma omp parallel num_threads(team)
  {
    Scratch rest{a.scratch, common + each * omp_get_thread_num()};
    const typename Work::Mine mine(rest, work);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < a.tokens; ++token) work.left.prepare(mine.wide, token);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < panels * blocks; ++unit) {
      const int64_t block = unit % blocks, first = block * a.tokens / blocks;
      work.run_unit(unit / blocks, first, (block + 1) * a.tokens / blocks - first, mine);
    }
  }
  return 0;
}

// At most so many rows at a time: as bf16 with 4,096 features they are 16 MiB.
constexpr int64_t kInputRows = 2048;

template <typename Tile, QuantizedKind kKind, typename T>
static int64_t in_parts(const QuantizedLinear& a) {
  int64_t bytes = 0;
  for (int64_t first = 0; first < a.tokens; first += kInputRows) {
    QuantizedLinear part = a;
    part.tokens = smaller(kInputRows, a.tokens - first);
    part.input = static_cast<const T*>(a.input) + first * a.input_row;
    if (a.residual) part.residual = static_cast<const T*>(a.residual) + first * a.residual_row;
    part.output = static_cast<T*>(a.output) + first * (a.epilogue == kSwiglu ? a.columns / 2 : a.columns);
    bytes = larger(bytes, quantized<Tile, kKind, T>(part));
  }
  return bytes;
}

template <QuantizedKind kKind, typename T>
static int64_t with_input(const QuantizedLinear& a) {
#ifdef __AVX512BF16__
  if constexpr (kKind == kInt8) {
    return in_parts<BytesTile, kKind, T>(a);
  } else {
    if constexpr (kKind == kInt4) {
      if (a.activation == kAsInt8) return in_parts<BytesTile, kKind, T>(a);
    }
    return in_parts<DotTile, kKind, T>(a);
  }
#else
  return in_parts<FmaTile, kKind, T>(a);
#endif
}

}  // namespace

int64_t quantized_linear(const QuantizedLinear& a) {
  int64_t bytes = 0;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (a.kind) {
      case kInt4:
        bytes = with_input<kInt4, T>(a);
        break;
      case kInt8:
        bytes = with_input<kInt8, T>(a);
        break;
      default:
        bytes = with_input<kFp8, T>(a);
    }
  });
  return bytes;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
