// Matrix products of 8-bit integers by VPDPBUSD: C[m, n] += scale[n] · (start[m] + sum over k of A[m, k] · B[k, n]), A
// signed, B unsigned, the sum exact in int32. `start` takes back what makes the codes of B unsigned.
//
// Registers as in tile_bf16.h, and for the same reason one block of assembly.
#pragma once

#include "tile_bf16.h"

#ifdef __AVX512VNNI__

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int kInt8Columns = 64;  // four vectors

#define M4OV_BYTES_DOT(from, x, into) "vpdpbusd %%zmm" x ", %%zmm" from ", %%zmm" into "\n\t"
#define M4OV_BYTES_ROW(at, x, s, t, u, v)                                                                   \
  "vpbroadcastd " at ", %%zmm" x "\n\t" M4OV_BYTES_DOT("24", x, s) M4OV_BYTES_DOT("25", x, t)               \
      M4OV_BYTES_DOT("26", x, u) M4OV_BYTES_DOT("27", x, v)
#define M4OV_BYTES_BEGIN(at, x, s, t, u, v)                                                       \
  "vpbroadcastd " at ", %%zmm" s "\n\tvmovdqa64 %%zmm" s ", %%zmm" t "\n\tvmovdqa64 %%zmm" s      \
  ", %%zmm" u "\n\tvmovdqa64 %%zmm" s ", %%zmm" v "\n\t"
#define M4OV_BYTES_PUT(at, z, y) \
  "vcvtdq2ps %%zmm" z ", %%zmm" z "\n\tvfmadd213ps " at ", %%zmm" y ", %%zmm" z "\n\tvmovups %%zmm" z ", " at "\n\t"
#define M4OV_BYTES_END(at, x, s, t, u, v)                                                                     \
  M4OV_BYTES_PUT(at, s, "24") M4OV_BYTES_PUT("64" at, t, "25") M4OV_BYTES_PUT("128" at, u, "26")              \
      M4OV_BYTES_PUT("192" at, v, "27")

#define M4OV_STARTS_1(what) what("(%[start])", "28", "0", "1", "2", "3")
#define M4OV_STARTS_2(what) M4OV_STARTS_1(what) what("4(%[start])", "28", "4", "5", "6", "7")
#define M4OV_STARTS_3(what) M4OV_STARTS_2(what) what("8(%[start])", "28", "8", "9", "10", "11")
#define M4OV_STARTS_4(what) M4OV_STARTS_3(what) what("12(%[start])", "28", "12", "13", "14", "15")
#define M4OV_STARTS_5(what) M4OV_STARTS_4(what) what("16(%[start])", "28", "16", "17", "18", "19")
#define M4OV_STARTS_6(what) M4OV_STARTS_5(what) what("20(%[start])", "28", "20", "21", "22", "23")

// What comes next from memory, a line a step: more at a time would wait for one another. One or two rows take less time
// than reading B, which the processor's own prefetching does only to the end of a page.
#define M4OV_BYTES_AHEAD "prefetcht1 (%[next])\n\tadd %[stride], %[next]\n\t"
#define M4OV_BYTES_FAR(at) "prefetcht0 " at "(%[b])\n\t"
#define M4OV_BYTES_AHEAD_1 M4OV_BYTES_FAR("4096") M4OV_BYTES_FAR("4160") M4OV_BYTES_FAR("4224") M4OV_BYTES_FAR("4288")
#define M4OV_BYTES_AHEAD_2 M4OV_BYTES_AHEAD_1
#define M4OV_BYTES_AHEAD_3 M4OV_BYTES_AHEAD
#define M4OV_BYTES_AHEAD_4 M4OV_BYTES_AHEAD
#define M4OV_BYTES_AHEAD_5 M4OV_BYTES_AHEAD
#define M4OV_BYTES_AHEAD_6 M4OV_BYTES_AHEAD

#define M4OV_BYTES_BLOCK(m)                                                                                           \
  asm volatile(M4OV_STARTS_##m(M4OV_BYTES_BEGIN) "1:\n\t" M4OV_BYTES_AHEAD_##m M4OV_COLUMNS_4 M4OV_ROWS_##m(M4OV_BYTES_ROW, "a", "a3", "lda") \
               "add $4, %[a]\n\tadd $4, %[a3]\n\tadd $256, %[b]\n\tsub $1, %[steps]\n\tjnz 1b\n\t" M4OV_FACTORS_4       \
                   M4OV_ROWS_##m(M4OV_BYTES_END, "c", "c3", "ldc")                                                    \
               : [a] "+r"(a), [a3] "+r"(a3), [b] "+r"(b), [steps] "+r"(steps), [next] "+r"(next)                      \
               : [c] "r"(c), [c3] "r"(c3), [lda] "r"(lda), [ldc] "r"(ldc_bytes), [scale] "r"(scale),                  \
                 [start] "r"(start), [stride] "r"(stride)                                                             \
               : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9",      \
                 "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20",   \
                 "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28", "zmm29")

// C [kRows, 64] with `ldc` elements to a row, A [kRows, 4 · steps] with `lda`, B [steps, 64, 4], `steps` > 0. From three
// rows on, memory at `next` and every `stride` bytes on, to each step, is prefetched.
template <int kRows>
static void bytes_tile(float* c, int64_t ldc, const int8_t* a, int64_t lda, const uint8_t* b, int64_t steps,
                       const int32_t* start, const float* scale, const uint8_t* next, int64_t stride) {
  const int8_t* a3 = a + 3 * lda;
  float* c3 = c + 3 * ldc;
  const int64_t ldc_bytes = 4 * ldc;
  if constexpr (kRows == 1) M4OV_BYTES_BLOCK(1);
  if constexpr (kRows == 2) M4OV_BYTES_BLOCK(2);
  if constexpr (kRows == 3) M4OV_BYTES_BLOCK(3);
  if constexpr (kRows == 4) M4OV_BYTES_BLOCK(4);
  if constexpr (kRows == 5) M4OV_BYTES_BLOCK(5);
  if constexpr (kRows == 6) M4OV_BYTES_BLOCK(6);
}

[[maybe_unused]] static void bytes_tile(float* c, int64_t ldc, const int8_t* a, int64_t lda, const uint8_t* b,
                                        int64_t rows, int64_t steps, const int32_t* start, const float* scale,
                                        const uint8_t* next, int64_t stride) {
#define M4OV_BYTES_TILE(m) \
  case m:                  \
    return bytes_tile<m>(c, ldc, a, lda, b, steps, start, scale, next, stride);
  switch (rows) {
    M4OV_BYTES_TILE(1) M4OV_BYTES_TILE(2) M4OV_BYTES_TILE(3) M4OV_BYTES_TILE(4) M4OV_BYTES_TILE(5) M4OV_BYTES_TILE(6)
  }
#undef M4OV_BYTES_TILE
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov

#endif
