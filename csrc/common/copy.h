// Rows that are moved as they are.
#pragma once

#include "simd.h"
#include "types.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kAheadBytes = 2048;  // the hardware's prefetchers stop at page ends

// What is only moved needs no dtype: rows are bytes, and a group of floats carries any bits.
constexpr int64_t kGroupBytes = kGroup * static_cast<int64_t>(sizeof(float));

template <bool kStream>
M4OV_INLINE void copy_row(char* target, const char* source, int64_t bytes) {
  int64_t i = 0;
  for (; i + kGroupBytes <= bytes; i += kGroupBytes) {
    prefetch(reinterpret_cast<const float*>(source + i + kAheadBytes));
    put<kStream>(reinterpret_cast<float*>(target + i), load(reinterpret_cast<const float*>(source + i)));
  }
  memcpy(target + i, source + i, bytes - i);
}

template <bool kStream>
M4OV_INLINE void clear_row(char* target, int64_t bytes) {
  int64_t i = 0;
  for (; i + kGroupBytes <= bytes; i += kGroupBytes) {
    put<kStream>(reinterpret_cast<float*>(target + i), both(set1(0.0f)));
  }
  memset(target + i, 0, bytes - i);
}

M4OV_INLINE void copy(char* target, const char* source, int64_t bytes, bool large) {
  if (large && vector_aligned(target)) {
    copy_row<true>(target, source, bytes);
  } else {
    copy_row<false>(target, source, bytes);
  }
}

M4OV_INLINE int64_t width_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
