// Scratch memory, and the little arithmetic of cutting work into blocks.
#pragma once

#include "simd.h"

namespace m4ov {
namespace M4OV_VARIANT {

M4OV_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
M4OV_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
M4OV_INLINE int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
M4OV_INLINE int64_t rounded_up(int64_t a, int64_t to) { return blocks_of(a, to) * to; }

namespace {  // nothing that the linker could share between variants

// Hands out 64-byte aligned pieces of one allocation. With a null base it only counts.
struct Scratch {
  char* base;
  int64_t used = 0;

  template <typename E>
  E* take(int64_t count) {
    char* piece = base + used;
    used += rounded_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return reinterpret_cast<E*>(piece);
  }
};

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
