// A run of a gated activation's forward: what the activation itself and its fusion with a quantisation share.
#pragma once

#include "functions.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

template <typename T, Function kFunction, bool kRoundTwice>
M4OV_INLINE Pair gated(Pair gate, Pair up) {
  const Pair activated = activate<T, kFunction>(gate);
  return (kRoundTwice ? round_to<T>(activated) : activated) * up;
}

template <typename T, Function kFunction, bool kRoundTwice, bool kStream>
static void forward_run(T* output, const T* gate, const T* up, int64_t count) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    prefetch(gate + i + kAhead<T>);
    prefetch(up + i + kAhead<T>);
    put<kStream>(output + i, gated<T, kFunction, kRoundTwice>(load(gate + i), load(up + i)));
  }
  if (i < count) {
    const int64_t rest = count - i;
    store_tail(output + i, gated<T, kFunction, kRoundTwice>(load_tail(gate + i, rest), load_tail(up + i, rest)), rest);
  }
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
