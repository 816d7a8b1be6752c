// A weight to the codes and scales of a quantised one, where the compiled kernels read them: no tensor in between.
//
// Rows are read twice: one after the other for their largest magnitudes, which brings them into L2, and in pieces of all
// rows of a panel for their codes, while what comes next is on its way from memory.
#include "codes.h"
#include "panels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int64_t kStrip = 128;   // rows, and columns, of a block that shares a scale
constexpr int64_t kPiece = 128;   // columns of a panel that are put in order at once
constexpr int64_t kL2Bytes = 256 << 10;  // of the weight, between the first reading and the second
constexpr int64_t kMostGroups = 64;      // in as many columns

// Of one piece of columns, or several: by group, then by output feature of the panel.
struct Scales {
  alignas(64) float scale[kMostGroups * kPanel];
  alignas(64) float reciprocal[kMostGroups * kPanel];

  void set(int64_t g, int64_t feature, float value) {
    scale[g * kPanel + feature] = value;
    reciprocal[g * kPanel + feature] = 1.0f / value;
  }
};

template <typename T, Kind kKind>
struct Work {
  static constexpr int64_t kTogether = kKind == kToInt4 ? 8 : kKind == kToInt8Panel ? 4 : 2;  // codes of one feature
  static constexpr int64_t kWordBytes = kKind == kToE4m3 ? 2 : 4;
  static constexpr int64_t kInByte = kKind == kToInt4 ? 2 : 1;
  static constexpr int64_t kTileRow = kPiece / kInByte;
  static constexpr uint8_t kPad = kKind == kToInt8Panel ? 128 : 0;

  const Requantize& a;
  const PanelRows of_panels;
  int64_t group, groups, words, panels;
  bool stream;
  uint32_t largest = 0;

  explicit Work(const Requantize& arguments) : a(arguments), of_panels(a.rows, a.paired) {
    group = a.group ? a.group : a.columns;
    groups = blocks_of(a.columns, group);
    words = blocks_of(a.columns, kTogether);
    panels = of_panels.count();
    stream = a.rows * a.columns * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
             reinterpret_cast<uintptr_t>(a.codes) % 64 == 0;
  }

  int64_t bytes() const { return a.rows * a.columns * static_cast<int64_t>(sizeof(T)); }
  int64_t first_row(int64_t panel) const { return of_panels.first(panel); }
  int64_t rows_of(int64_t panel) const { return of_panels.rows(panel); }
  const T* row(int64_t n) const { return static_cast<const T*>(a.weight) + n * a.weight_stride; }

  void saw(uint32_t bits) {
    uint32_t known = __atomic_load_n(&largest, __ATOMIC_RELAXED);
    while (bits > known) {
      if (__atomic_compare_exchange_n(&largest, &known, bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
    }
  }

  // The scales of weights whose largest magnitudes have these bits, as they are stored.
  V scales_of(I bits) const {
    const V ideal = as_floats(bits) / set1(kKind == kToInt4 ? 7.5f : kKind == kToInt8Panel ? 127.5f : kLargestE4m3);
    const V least = max(ideal, set1(a.scale_dtype == kFloat16 ? 0x1p-24f : 0x1p-126f));
    const V scale = where_negative(as_floats(as_ints(ideal) + ints(-1)), set1(1.0f), least);  // 1 where it is 0
    if (a.scale_dtype == kBFloat16) return round_to<Bf16>(scale);
    return a.scale_dtype == kFloat16 ? round_to<Fp16>(scale) : scale;
  }
  float scale_of_bits(uint32_t bits) const {
    float lanes[kLanes];
    store_vector(lanes, scales_of(ints(static_cast<int>(bits))));
    return lanes[0];
  }

  // Those of one group for all features of a panel; 0 past the end.
  void store_scales(int64_t panel, int64_t g, const float* scale) const {
    alignas(64) float all[kPanel];
    const int64_t count = rows_of(panel);
    for (int64_t f = 0; f < kPanel; ++f) all[f] = f < count ? scale[f] : 0.0f;
    const int64_t place = (panel * groups + g) * kPanel;
    for (int64_t f = 0; f < kPanel; f += kGroup) {
      if (a.scale_dtype == kBFloat16) {
        uint8_t* to = static_cast<uint8_t*>(a.scales) + 2 * (place + f);
        put_halves<false>(to, right<16>(as_ints(load_vector(all + f))));
        put_halves<false>(to + 2 * kLanes, right<16>(as_ints(load_vector(all + f + kLanes))));
      } else if (a.scale_dtype == kFloat16) {
        store(static_cast<Fp16*>(a.scales) + place + f, load(all + f));
      } else {
        store(static_cast<float*>(a.scales) + place + f, load(all + f));
      }
    }
  }

  // ---- The second reading

  // `ahead`: elements from what is read to what comes.
  void write(int64_t panel, int64_t column, int64_t end, const Scales& scales, int64_t ahead) const {
    alignas(64) uint8_t tile[kPanel * kTileRow], ordered[kPanel * kTileRow];
    const int64_t first = first_row(panel), count = rows_of(panel);
    for (int64_t k = column; k < end; k += kPiece) {
      const int64_t n = smaller(kPiece, end - k), each = smaller(group, n), g = (k - column) / group;
      if (count < kPanel || n < kPiece) memset(tile, kPad, sizeof tile);
      for (int64_t f = 0; f < count; ++f) {
        const T* x = row(first + f) + k;
        uint8_t* to = tile + f * kTileRow;
        int64_t place = g * kPanel + f;
        for (int64_t j = 0; j < n; j += each, place += kPanel) {
          const Divisor by = divisor(scales.scale[place], scales.reciprocal[place]);
          const int64_t run = smaller(each, n - j);
          if (kFused && scales.scale[place] < kLeastScale) {
            write_codes<kKind, true, false, true>(to + j / kInByte, x + j, run, by, x + j + ahead);
          } else {
            write_codes<kKind, false, false, true>(to + j / kInByte, x + j, run, by, x + j + ahead);
          }
        }
      }
      const int64_t made = blocks_of(n, kTogether);
      uint8_t* to = a.codes + (panel * words + k / kTogether) * kPanel * kWordBytes;
      put_in_order<kWordBytes, kTileRow>(ordered, tile);
      stream ? stream_lines(to, ordered, made * kPanel * kWordBytes)
             : static_cast<void>(memcpy(to, ordered, made * kPanel * kWordBytes));
    }
  }

  // ---- A scale for a row, or for a group of one

  void by_rows() {
    // Whole groups, and whole pieces, of as many columns as L2 holds; all of them where a row has one scale.
    const int64_t fitting = kL2Bytes / (kPanel * static_cast<int64_t>(sizeof(T)));
    const int64_t chunk = a.group ? smaller(larger(fitting / kPiece * kPiece, kPiece), kMostGroups * group) : a.columns;
    parallel_ranges(panels, bytes(), a.threads, [&](int64_t begin, int64_t end) {
      Scales scales;
      alignas(64) uint32_t bits[kMostGroups * kPanel] = {};
      uint32_t seen = 0;
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = first_row(panel), count = rows_of(panel);
        for (int64_t column = 0; column < a.columns; column += chunk) {
          const int64_t last = smaller(a.columns, column + chunk), some = blocks_of(last - column, group);
          for (int64_t f = 0; f < count; ++f) {
            const T* x = row(first + f) + column;
            for (int64_t g = 0; g < some; ++g) {
              Largest<T> found;
              found.template add<true>(x + g * group, smaller(group, last - column - g * group));
              bits[g * kPanel + f] = found.value();
              seen = bits[g * kPanel + f] > seen ? bits[g * kPanel + f] : seen;
            }
          }
          for (int64_t g = 0; g < some; ++g) {
            for (int64_t f = g * kPanel; f < (g + 1) * kPanel; f += kLanes) {
              I magnitudes;
              memcpy(&magnitudes, bits + f, sizeof magnitudes);
              const V scale = scales_of(magnitudes);
              store_vector(scales.scale + f, scale);
              store_vector(scales.reciprocal + f, set1(1.0f) / scale);
            }
            store_scales(panel, column / group + g, scales.scale + g * kPanel);
          }
          const int64_t next = (first_row(panel + 1) - first) * a.weight_stride - column;
          write(panel, column, last, scales, last < a.columns ? chunk : next);
        }
      }
      saw(seen);
      if (stream) fence();
    });
  }

  // ---- A scale for 128 × 128, or for all

  // The scales of the blocks of one strip of rows, from the block of `column` on.
  void strip_scales(float* scales, int64_t strip, int64_t column, int64_t end) {
    constexpr int64_t kAtOnce = 8;
    const int64_t first = strip * kStrip, count = smaller(kStrip, a.rows - first);
    uint32_t seen = 0;
    for (int64_t k = column; k < end; k += kAtOnce * kStrip) {
      const int64_t last = smaller(end, k + kAtOnce * kStrip), blocks = blocks_of(last - k, kStrip);
      Largest<T> found[kAtOnce];
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t from = k + i * kStrip;
          found[i].template add<true>(row(first + n) + from, smaller(kStrip, last - from));
        }
      }
      for (int64_t i = 0; i < blocks; ++i) {
        const uint32_t bits = found[i].value();
        seen = bits > seen ? bits : seen;
        scales[(k - column) / kStrip + i] = scale_of_bits(bits);
      }
    }
    saw(seen);
  }

  void by_strips() {
    constexpr int64_t kChunk = 1024;
    parallel_ranges(blocks_of(a.rows, kStrip), bytes(), a.threads, [&](int64_t begin, int64_t end) {
      float of[kChunk / kStrip];
      Scales scales;
      for (int64_t strip = begin; strip < end; ++strip) {
        for (int64_t column = 0; column < a.columns; column += kChunk) {
          const int64_t last = smaller(a.columns, column + kChunk), some = blocks_of(last - column, kStrip);
          strip_scales(of, strip, column, last);
          for (int64_t i = 0; i < some * kPanel; ++i) scales.set(i / kPanel, i % kPanel, of[i / kPanel]);
          for (int64_t panel = 2 * strip; panel < smaller(panels, 2 * strip + 2); ++panel) {
            for (int64_t g = 0; g < some; ++g) store_scales(panel, column / kStrip + g, scales.scale + g * kPanel);
            write(panel, column, last, scales, last < a.columns ? kChunk : kStrip * a.weight_stride - column);
          }
        }
      }
      if (stream) fence();
    });
  }

  // All scales first: a panel is of rows of more strips than one.
  void in_two_steps() {
    if (a.span == 1) {
      parallel_ranges(blocks_of(a.rows, kStrip), bytes(), a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t strip = begin; strip < end; ++strip) strip_scales(a.scratch + strip * groups, strip, 0, a.columns);
      });
    } else {
      parallel_ranges(a.rows, bytes(), a.threads, [&](int64_t begin, int64_t end) {
        Largest<T> found;
        for (int64_t n = begin; n < end; ++n) found.template add<true>(row(n), a.columns);
        saw(found.value());
      });
      a.scratch[0] = scale_of_bits(largest);
    }
    const int64_t chunk = a.span == 1 ? kMostGroups * kStrip : a.columns;
    parallel_ranges(panels, bytes(), a.threads, [&](int64_t begin, int64_t end) {
      Scales scales;
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t column = 0; column < a.columns; column += chunk) {
          const int64_t last = smaller(a.columns, column + chunk), some = blocks_of(last - column, group);
          for (int64_t g = 0; g < some; ++g) {
            for (int64_t f = 0; f < kPanel; ++f) {
              const int64_t strip = a.span == 1 && f < rows_of(panel) ? (first_row(panel) + f) / kStrip : 0;
              scales.set(g, f, a.scratch[strip * groups + column / group + g]);
            }
            store_scales(panel, column / group + g, scales.scale + g * kPanel);
          }
          write(panel, column, last, scales, kPiece);
        }
      }
      if (stream) fence();
    });
  }

  int64_t run() {
    if (a.span == 0) {
      by_rows();
    } else if (a.span == 1 && !a.paired) {
      by_strips();
    } else {
      in_two_steps();
    }
    return largest;
  }
};

}  // namespace

int64_t requantize(const Requantize& a) {
  int64_t largest = 0;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.kind == 0) {
      largest = Work<T, kToInt4>(a).run();
    } else if (a.kind == 1) {
      largest = Work<T, kToInt8Panel>(a).run();
    } else {
      largest = Work<T, kToE4m3>(a).run();
    }
  });
  return largest;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
