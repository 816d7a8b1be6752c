// Matrix products of bf16 by VDPBF16PS: C[m, n] (+)= A[m, k] · B[k, n], sums in fp32.
//
// Accumulators in zmm0 to zmm23, four to a row; a step of B in zmm24 to zmm27; elements of A in zmm28 and zmm29. The
// whole loop is one block of assembly: from intrinsics GCC 12 spills the accumulators, which costs a third of the speed.
#pragma once

#include "tile_fma.h"

#ifdef __AVX512BF16__

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

// A row: two neighbours in k of one row of A, times 1 to 4 vectors of B.
#define M4OV_DOT(from, x, into) "vdpbf16ps %%zmm" from ", %%zmm" x ", %%zmm" into "\n\t"
#define M4OV_ROW_1(at, x, s, t, u, v) "vpbroadcastd " at ", %%zmm" x "\n\t" M4OV_DOT("24", x, s)
#define M4OV_ROW_2(at, x, s, t, u, v) M4OV_ROW_1(at, x, s, t, u, v) M4OV_DOT("25", x, t)
#define M4OV_ROW_3(at, x, s, t, u, v) M4OV_ROW_2(at, x, s, t, u, v) M4OV_DOT("26", x, u)
#define M4OV_ROW_4(at, x, s, t, u, v) M4OV_ROW_3(at, x, s, t, u, v) M4OV_DOT("27", x, v)
#define M4OV_COLUMNS_1 "vmovups (%[b]), %%zmm24\n\t"
#define M4OV_COLUMNS_2 M4OV_COLUMNS_1 "vmovups 64(%[b]), %%zmm25\n\t"
#define M4OV_COLUMNS_3 M4OV_COLUMNS_2 "vmovups 128(%[b]), %%zmm26\n\t"
#define M4OV_COLUMNS_4 M4OV_COLUMNS_3 "vmovups 192(%[b]), %%zmm27\n\t"

// The same for C, `at` the row's address: accumulators begin at zero; at the end C is added, or C times the scale, or
// they are multiplied by the scale and C is added; the scale is in zmm24 to zmm27 then.
#define M4OV_ZERO(z) "vpxord %%zmm" z ", %%zmm" z ", %%zmm" z "\n\t"
#define M4OV_CLEAR_1(at, x, s, t, u, v) M4OV_ZERO(s)
#define M4OV_CLEAR_2(at, x, s, t, u, v) M4OV_ZERO(s) M4OV_ZERO(t)
#define M4OV_CLEAR_3(at, x, s, t, u, v) M4OV_CLEAR_2(at, x, s, t, u, v) M4OV_ZERO(u)
#define M4OV_CLEAR_4(at, x, s, t, u, v) M4OV_CLEAR_3(at, x, s, t, u, v) M4OV_ZERO(v)
#define M4OV_STORE(what, at, z, y) what(at, z, y) "vmovups %%zmm" z ", " at "\n\t"
#define M4OV_STORE_1(what, at, s, t, u, v) M4OV_STORE(what, at, s, "24")
#define M4OV_STORE_2(what, at, s, t, u, v) M4OV_STORE_1(what, at, s, t, u, v) M4OV_STORE(what, "64" at, t, "25")
#define M4OV_STORE_3(what, at, s, t, u, v) M4OV_STORE_2(what, at, s, t, u, v) M4OV_STORE(what, "128" at, u, "26")
#define M4OV_STORE_4(what, at, s, t, u, v) M4OV_STORE_3(what, at, s, t, u, v) M4OV_STORE(what, "192" at, v, "27")
#define M4OV_ZERO_STORE(at, z, y) ""
#define M4OV_KEEP_STORE(at, z, y) "vaddps " at ", %%zmm" z ", %%zmm" z "\n\t"
#define M4OV_SCALE_STORE(at, z, y) "vfmadd231ps " at ", %%zmm" y ", %%zmm" z "\n\t"
#define M4OV_ADDSCALED_STORE(at, z, y) "vfmadd213ps " at ", %%zmm" y ", %%zmm" z "\n\t"
#define M4OV_ZERO_1(at, x, s, t, u, v) M4OV_STORE_1(M4OV_ZERO_STORE, at, s, t, u, v)
#define M4OV_ZERO_2(at, x, s, t, u, v) M4OV_STORE_2(M4OV_ZERO_STORE, at, s, t, u, v)
#define M4OV_ZERO_3(at, x, s, t, u, v) M4OV_STORE_3(M4OV_ZERO_STORE, at, s, t, u, v)
#define M4OV_ZERO_4(at, x, s, t, u, v) M4OV_STORE_4(M4OV_ZERO_STORE, at, s, t, u, v)
#define M4OV_KEEP_1(at, x, s, t, u, v) M4OV_STORE_1(M4OV_KEEP_STORE, at, s, t, u, v)
#define M4OV_KEEP_2(at, x, s, t, u, v) M4OV_STORE_2(M4OV_KEEP_STORE, at, s, t, u, v)
#define M4OV_KEEP_3(at, x, s, t, u, v) M4OV_STORE_3(M4OV_KEEP_STORE, at, s, t, u, v)
#define M4OV_KEEP_4(at, x, s, t, u, v) M4OV_STORE_4(M4OV_KEEP_STORE, at, s, t, u, v)
#define M4OV_SCALE_1(at, x, s, t, u, v) M4OV_STORE_1(M4OV_SCALE_STORE, at, s, t, u, v)
#define M4OV_SCALE_2(at, x, s, t, u, v) M4OV_STORE_2(M4OV_SCALE_STORE, at, s, t, u, v)
#define M4OV_SCALE_3(at, x, s, t, u, v) M4OV_STORE_3(M4OV_SCALE_STORE, at, s, t, u, v)
#define M4OV_SCALE_4(at, x, s, t, u, v) M4OV_STORE_4(M4OV_SCALE_STORE, at, s, t, u, v)
#define M4OV_ADDSCALED_1(at, x, s, t, u, v) M4OV_STORE_1(M4OV_ADDSCALED_STORE, at, s, t, u, v)
#define M4OV_ADDSCALED_2(at, x, s, t, u, v) M4OV_STORE_2(M4OV_ADDSCALED_STORE, at, s, t, u, v)
#define M4OV_ADDSCALED_3(at, x, s, t, u, v) M4OV_STORE_3(M4OV_ADDSCALED_STORE, at, s, t, u, v)
#define M4OV_ADDSCALED_4(at, x, s, t, u, v) M4OV_STORE_4(M4OV_ADDSCALED_STORE, at, s, t, u, v)
#define M4OV_FACTORS_1 "vmovups (%[scale]), %%zmm24\n\t"
#define M4OV_FACTORS_2 M4OV_FACTORS_1 "vmovups 64(%[scale]), %%zmm25\n\t"
#define M4OV_FACTORS_3 M4OV_FACTORS_2 "vmovups 128(%[scale]), %%zmm26\n\t"
#define M4OV_FACTORS_4 M4OV_FACTORS_3 "vmovups 192(%[scale]), %%zmm27\n\t"
#define M4OV_BEFORE_ZERO(n) ""
#define M4OV_BEFORE_KEEP(n) ""
#define M4OV_BEFORE_SCALE(n) M4OV_FACTORS_##n
#define M4OV_BEFORE_ADDSCALED(n) M4OV_FACTORS_##n

// `what` for each row of a matrix whose rows 0 and 3 are at `p` and `q`, `d` bytes apart.
#define M4OV_ROWS_1(what, p, q, d) what("(%[" p "])", "28", "0", "1", "2", "3")
#define M4OV_ROWS_2(what, p, q, d) \
  M4OV_ROWS_1(what, p, q, d) what("(%[" p "],%[" d "])", "29", "4", "5", "6", "7")
#define M4OV_ROWS_3(what, p, q, d) \
  M4OV_ROWS_2(what, p, q, d) what("(%[" p "],%[" d "],2)", "28", "8", "9", "10", "11")
#define M4OV_ROWS_4(what, p, q, d) M4OV_ROWS_3(what, p, q, d) what("(%[" q "])", "29", "12", "13", "14", "15")
#define M4OV_ROWS_5(what, p, q, d) \
  M4OV_ROWS_4(what, p, q, d) what("(%[" q "],%[" d "])", "28", "16", "17", "18", "19")
#define M4OV_ROWS_6(what, p, q, d) \
  M4OV_ROWS_5(what, p, q, d) what("(%[" q "],%[" d "],2)", "29", "20", "21", "22", "23")

#define M4OV_DOT_BLOCK(m, n, start)                                                                                  \
  asm volatile(M4OV_ROWS_##m(M4OV_CLEAR_##n, "c", "c3", "ldc")                                                   \
               "1:\n\t" M4OV_COLUMNS_##n M4OV_ROWS_##m(M4OV_ROW_##n, "a", "a3", "lda")                               \
               "add $4, %[a]\n\tadd $4, %[a3]\n\tadd %[ldb], %[b]\n\tsub $1, %[steps]\n\tjnz 1b\n\t"                 \
               M4OV_BEFORE_##start(n) M4OV_ROWS_##m(M4OV_##start##_##n, "c", "c3", "ldc")                                                       \
               : [a] "+r"(a), [a3] "+r"(a3), [b] "+r"(b), [steps] "+r"(steps)                                        \
               : [c] "r"(c), [c3] "r"(c3), [lda] "r"(lda_bytes), [ldb] "r"(ldb_bytes), [ldc] "r"(ldc_bytes),         \
                 [scale] "r"(scale)                                                                                  \
               : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9",     \
                 "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20",  \
                 "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28", "zmm29")

struct DotTile {
  using Element = Bf16;
  static constexpr int kPair = 2;
  static constexpr int kVectors = 4;

  // `steps` > 0: pairs of k.
  template <int kRows, int kColumns, Start kStart>
  static void tile(float* c, int64_t ldc, const Bf16* a, int64_t lda, const Bf16* b, int64_t ldb, int64_t steps,
                   const float* scale) {
    const Bf16* a3 = a + 3 * lda;
    float* c3 = c + 3 * ldc;
    const int64_t lda_bytes = 2 * lda, ldb_bytes = 2 * ldb, ldc_bytes = 4 * ldc;
#define M4OV_DOT_TILE(m, n)                  \
  if constexpr (kRows == m && kColumns == n) { \
    if constexpr (kStart == kZero) {         \
      M4OV_DOT_BLOCK(m, n, ZERO);            \
    } else if constexpr (kStart == kKeep) {  \
      M4OV_DOT_BLOCK(m, n, KEEP);            \
    } else if constexpr (kStart == kScale) { \
      M4OV_DOT_BLOCK(m, n, SCALE);           \
    } else {                                 \
      M4OV_DOT_BLOCK(m, n, ADDSCALED);       \
    }                                        \
  }
#define M4OV_DOT_TILES(m) M4OV_DOT_TILE(m, 1) M4OV_DOT_TILE(m, 2) M4OV_DOT_TILE(m, 3) M4OV_DOT_TILE(m, 4)
    M4OV_DOT_TILES(1)
    M4OV_DOT_TILES(2)
    M4OV_DOT_TILES(3)
    M4OV_DOT_TILES(4)
    M4OV_DOT_TILES(5)
    M4OV_DOT_TILES(6)
#undef M4OV_DOT_TILES
#undef M4OV_DOT_TILE
  }
};

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov

#endif
