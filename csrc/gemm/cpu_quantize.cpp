// Activations to int8 or e4m3: a scale for a row, for 128 elements of one, or for 128 × 128 of them; and the operators
// that the quantisation follows, RMSNorm and SwiGLU, whose results then never leave the cache.
#include "../activation/gated_run.h"
#include "../norm/rms_norm_row.h"
#include "codes.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int64_t kBlock = 128;          // elements that share a scale, of rows and of blocks
constexpr int64_t kBlocksAtOnce = 8;     // side by side; 128 rows of them stay in L2 between the two passes

// ---- Rows: two passes, the second from the cache.

template <Kind kKind, typename T>
static void rows(const QuantizeRows& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = a.rows * a.columns >= kStreamBytes / 2;
  const int64_t group = a.group ? a.group : a.columns, groups = blocks_of(a.columns, group);
  parallel_ranges(a.rows, bytes, a.threads, [&](int64_t begin, int64_t end) {
    const auto input = [&](int64_t row) { return static_cast<const T*>(a.input) + row * a.input_stride; };
    const auto scale = [&](int64_t row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * group;
        a.scales[row * groups + g] =
            scale_of<kKind>(largest_of(input(row) + first, smaller(group, a.columns - first)));
      }
    };
    // The next row's scales are a chain of slow operations: they are found while this row is written.
    scale(begin);
    for (int64_t row = begin; row < end; ++row) {
      if (row + 1 < end) scale(row + 1);
      uint8_t* codes = static_cast<uint8_t*>(a.codes) + row * a.columns;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * group, count = smaller(group, a.columns - first);
        const float scale = a.scales[row * groups + g];
        write_run<kKind, false>(codes + first, input(row) + first, count, scale, divisor(scale),
                                input(row) + first + 2 * a.input_stride, large);
      }
    }
    if (large) fence();
  });
}

// ---- Blocks

// 16 × 16 bytes.
static void transpose_bytes(uint8_t* to, int64_t to_stride, const uint8_t* from, int64_t from_stride) {
  __m128i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
  // Each step interleaves row i with row i + 8; four of them transpose.
  for (int step = 0; step < 2; ++step) {
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
      x[2 * i] = _mm_unpacklo_epi8(y[i], y[i + 8]);
      x[2 * i + 1] = _mm_unpackhi_epi8(y[i], y[i + 8]);
    }
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), x[i]);
}

static void transpose(uint8_t* to, int64_t to_stride, const uint8_t* from, int64_t from_stride, int64_t rows,
                      int64_t columns) {
  int64_t column = 0;
  for (; column + 16 <= columns; column += 16) {
    int64_t row = 0;
    for (; row + 16 <= rows; row += 16) {
      transpose_bytes(to + column * to_stride + row, to_stride, from + row * from_stride + column, from_stride);
    }
    for (; row < rows; ++row) {
      for (int64_t i = column; i < column + 16; ++i) to[i * to_stride + row] = from[row * from_stride + i];
    }
  }
  for (; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) to[column * to_stride + row] = from[row * from_stride + column];
  }
}

// One block's values to 128 bytes of each of its columns, by way of a copy in L1: what lies so far apart in memory is
// touched once.
static void turn_block(const QuantizeBlocks& a, int64_t first_row, int64_t first_column, int64_t rows, int64_t columns,
                       bool stream) {
  alignas(64) uint8_t turned[kBlock * kBlock];
  const uint8_t* codes = static_cast<const uint8_t*>(a.codes) + first_row * a.columns + first_column;
  transpose(turned, kBlock, codes, a.columns, rows, columns);
  uint8_t* to = static_cast<uint8_t*>(a.transposed) + first_column * a.rows + first_row;
  const bool lines = stream && rows == kBlock && (reinterpret_cast<uintptr_t>(to) | a.rows) % 64 == 0;
  for (int64_t i = 0; i < columns; ++i) {
    lines ? stream_lines(to + i * a.rows, turned + i * kBlock, kBlock)
          : static_cast<void>(memcpy(to + i * a.rows, turned + i * kBlock, rows));
  }
}

template <typename T>
static void blocks(const QuantizeBlocks& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = a.rows * a.columns >= kStreamBytes / 2;
  const int64_t across = blocks_of(a.columns, kBlock), pieces = blocks_of(across, kBlocksAtOnce);
  parallel_ranges(blocks_of(a.rows, kBlock) * pieces, bytes, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t strip = unit / pieces, block = unit % pieces * kBlocksAtOnce;
      const int64_t first = strip * kBlock, count = smaller(kBlock, a.rows - first);
      const int64_t side = smaller(kBlocksAtOnce, across - block);
      const auto width = [&](int64_t i) { return smaller(kBlock, a.columns - (block + i) * kBlock); };
      const T* input = static_cast<const T*>(a.input) + first * a.input_stride + block * kBlock;
      float* scales = a.scales + strip * across + block;
      Largest<T> largest[kBlocksAtOnce];
      for (int64_t row = 0; row < count; ++row) {
        const T* x = input + row * a.input_stride;
        for (int64_t i = 0; i < side; ++i) {
          for (int64_t j = 0; j < kBlock; j += kGroup) prefetch<true>(x + 4 * a.input_stride + i * kBlock + j);
          largest[i].add(x + i * kBlock, width(i));
        }
      }
      Divisor by[kBlocksAtOnce];
      for (int64_t i = 0; i < side; ++i) {
        scales[i] = scale_of<kToE4m3>(largest[i].value());
        by[i] = divisor(scales[i]);
      }
      uint8_t* codes = static_cast<uint8_t*>(a.codes) + first * a.columns + block * kBlock;
      for (int64_t row = 0; row < count; ++row) {
        const T* x = input + row * a.input_stride;
        for (int64_t i = 0; i < side; ++i) {
          write_run<kToE4m3, false>(codes + row * a.columns + i * kBlock, x + i * kBlock, width(i), scales[i], by[i],
                                  x + a.input_stride + i * kBlock, large && !a.transposed);  // what is read again stays
        }
      }
      for (int64_t i = 0; a.transposed && i < side; ++i) {
        turn_block(a, first, (block + i) * kBlock, count, width(i), large);
      }
    }
    if (large) fence();
  });
}

// ---- After an operator, row by row: what it makes is rounded to T in a row of scratch, and quantised there.

// `ahead`: what the next row is made of, on its way to L2: L1 is full of this one.
template <typename T, Kind kKind>
static void quantize_row(void* codes, float* scales, const T* made, int64_t row, int64_t columns, const T* ahead,
                         bool stream) {
  const float scale = scales[row] = scale_of<kKind>(largest_of(made, columns));
  uint8_t* to = static_cast<uint8_t*>(codes) + row * columns;
  write_run<kKind, true>(to, made, columns, scale, divisor(scale), ahead, stream);
}

template <typename T>
static T* scratch_row(char* scratch, int64_t columns) {  // this thread's
  const int64_t each = rounded_up(columns * static_cast<int64_t>(sizeof(T)), 64);
  return reinterpret_cast<T*>(scratch + omp_get_thread_num() * each);
}

template <typename T, Kind kKind, int kNumerics, bool kResidual>
static void after_norm(const RmsNormQuantize& a) {
  constexpr bool kRounded = kNumerics != kFp32;
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = a.rows * a.columns >= kStreamBytes / 2;
  parallel_ranges(a.rows, bytes, a.threads, [&](int64_t begin, int64_t end) {
    T* made = scratch_row<T>(a.scratch, a.columns);
    const T* weight = static_cast<const T*>(a.weight);
    const auto input = [&](int64_t row) { return static_cast<const T*>(a.hidden_states) + row * a.hidden_stride; };
    const auto added = [&](int64_t row) {
      return kResidual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
    };
    for (int64_t row = begin; row < end; ++row) {
      const float squares = square_sum<T, kResidual, kRounded>(input(row), added(row), a.columns);
      const float rstd = reciprocal_root(squares, a.columns, a.eps);
      T* total = kResidual ? static_cast<T*>(a.new_residual) + row * a.columns : nullptr;
      if (large && vector_aligned(total)) {
        write_row<T, kNumerics, kResidual, true, false>(made, total, input(row), added(row), weight, rstd, a.columns,
                                                        0, a.residual_stride);
      } else {
        write_row<T, kNumerics, kResidual, false, false>(made, total, input(row), added(row), weight, rstd, a.columns,
                                                         0, a.residual_stride);
      }
      quantize_row<T, kKind>(a.codes, a.scales, made, row, a.columns, input(row) + a.hidden_stride, large);
    }
    if (large) fence();
  });
}

template <typename T, Kind kKind, int kNumerics>
static void after_norm(const RmsNormQuantize& a) {
  a.residual ? after_norm<T, kKind, kNumerics, true>(a) : after_norm<T, kKind, kNumerics, false>(a);
}

template <typename T, Kind kKind>
static void after_norm(const RmsNormQuantize& a) {
  switch (a.numerics) {
    case kHf:
      return after_norm<T, kKind, kHf>(a);
    case kVllm:
      return after_norm<T, kKind, kVllm>(a);
    default:
      return after_norm<T, kKind, kFp32>(a);
  }
}

template <typename T, Kind kKind, bool kRoundTwice>
static void after_swiglu(const SwigluQuantize& a) {
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const bool large = a.rows * a.columns >= kStreamBytes / 2;
  parallel_ranges(a.rows, bytes, a.threads, [&](int64_t begin, int64_t end) {
    T* made = scratch_row<T>(a.scratch, a.columns);
    for (int64_t row = begin; row < end; ++row) {
      forward_run<T, kSilu, kRoundTwice, false>(made, static_cast<const T*>(a.gate) + row * a.gate_stride,
                                                static_cast<const T*>(a.up) + row * a.up_stride, a.columns);
      quantize_row<T, kKind>(a.codes, a.scales, made, row, a.columns,
                             static_cast<const T*>(a.gate) + (row + 1) * a.gate_stride, large);
    }
    if (large) fence();
  });
}

template <typename T, Kind kKind>
static void after_swiglu(const SwigluQuantize& a) {
  a.numerics == kFp32 ? after_swiglu<T, kKind, false>(a) : after_swiglu<T, kKind, true>(a);
}

}  // namespace

void quantize_rows(const QuantizeRows& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.fp8 ? rows<kToE4m3, T>(a) : rows<kToInt8, T>(a);
  });
}

void quantize_blocks(const QuantizeBlocks& a) {
  with_dtype(a.dtype, [&](auto tag) { blocks<typename decltype(tag)::type>(a); });
}

void rms_norm_quantize(const RmsNormQuantize& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.fp8 ? after_norm<T, kToE4m3>(a) : after_norm<T, kToInt8>(a);
  });
}

void swiglu_quantize(const SwigluQuantize& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.fp8 ? after_swiglu<T, kToE4m3>(a) : after_swiglu<T, kToInt8>(a);
  });
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
