// The codes of a quantised weight, row by row, to its panels.
#include "panels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int64_t kPiece = 128;  // bytes of each row of a panel that are put in order at once
constexpr int64_t kAhead = 1024;  // bytes from what is read to what comes from memory meanwhile

template <int64_t kWordBytes>
static void pack(const PackPanels& a) {
  const PanelRows of_panels(a.rows, a.paired);
  const int64_t words = blocks_of(a.columns, kWordBytes);
  parallel_ranges(of_panels.count(), a.rows * a.columns, a.threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t tile[kPanel * kPiece], ordered[kPanel * kPiece];
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t count = of_panels.rows(panel);
      const uint8_t* rows = a.codes + of_panels.first(panel) * a.row_stride;
      uint8_t* to = a.panels + panel * words * kPanel * kWordBytes;
      for (int64_t column = 0; column < a.columns; column += kPiece) {
        const int64_t n = smaller(kPiece, a.columns - column);
        if (count < kPanel || n < kPiece) memset(tile, a.flip, sizeof tile);
        for (int64_t f = 0; f < count; ++f) {
          const uint8_t* x = rows + f * a.row_stride + column;
          for (int64_t i = 0; i < kPiece; i += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(x) + kAhead + i, _MM_HINT_T1);
          }
          for (int64_t i = 0; i < n; ++i) tile[f * kPiece + i] = x[i] ^ a.flip;
        }
        put_in_order<kWordBytes, kPiece>(ordered, tile);
        const int64_t made = blocks_of(n, kWordBytes) * kPanel * kWordBytes;
        memcpy(to + column * kPanel, ordered, made);
      }
    }
  });
}

}  // namespace

void pack_panels(const PackPanels& a) { a.word_bytes == 2 ? pack<2>(a) : pack<4>(a); }

}  // namespace M4OV_VARIANT
}  // namespace m4ov
