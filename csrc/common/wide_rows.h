// What products of matrices start from: the tile for a dtype, rows in its elements, and the parts of a long sum.
#pragma once

#include "pack.h"
#include "parallel.h"
#include "scratch.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

// body(tile, element type): bf16 products where the processor has them.
template <typename Body>
M4OV_INLINE void with_tile(int dtype, const Body& body) {
  with_dtype(dtype, [&](auto tag) {
#ifdef __AVX512BF16__
    if constexpr (kSame<typename decltype(tag)::type, Bf16>) return body(Tag<DotTile>{}, tag);
#endif
    body(Tag<FmaTile>{}, tag);
  });
}

// Long sums are taken in parts: a part of 64 columns (64 KiB of bf16) stays in L2 while the rows of a tile pass by, and
// fp32 loses less than in one long sum.
template <typename T>
constexpr int64_t kSumPart = kSame<T, float> ? 32 : 512;

// Rows of a matrix as the tile's elements with an even number of columns for pairs: where they lie, or copied into a
// buffer.
template <typename Tile, typename T>
struct WideRows {
  using E = typename Tile::Element;
  static constexpr int64_t kPair = Tile::kPair;
  const T* rows;
  int64_t stride, dim;

  int64_t width() const { return rounded_up(dim, kPair); }
  bool copied() const { return !kSame<E, T> || width() != dim; }
  int64_t buffer_size(int64_t count) const { return copied() ? count * width() : 0; }

  struct View {
    const E* rows;
    int64_t stride;
  };
  View view(E* buffer, int64_t first, int64_t count) const {
    if constexpr (kSame<E, T>) {
      if (!copied()) return {rows + first * stride, stride};
    }
    for (int64_t i = 0; i < count; ++i) {
      E* to = buffer + i * width();
      if constexpr (kSame<E, T>) {
        memcpy(to, rows + (first + i) * stride, dim * sizeof(E));
        memset(to + dim, 0, (width() - dim) * sizeof(E));
      } else {
        widen(to, rows + (first + i) * stride, dim);
      }
    }
    return {buffer, width()};
  }
};

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
