// The arguments of the loops that benchmarks are held against, and their list: X(result, function, arguments).
#pragma once

#include "types.h"

namespace m4ov {

// Reads every byte and does nothing else: what reading costs.
struct ReadBytes {
  const void* from;  // any alignment
  int64_t bytes;
  int threads;
};

enum DotKind : int { kDotInt8, kDotBf16 };

// Dot products of registers alone, by the fastest instructions of the instruction set: what arithmetic can reach.
struct DotLoop {
  int kind;  // DotKind
  int64_t steps;
  int threads;
};

}  // namespace m4ov

// read_bytes: the exclusive or of the bytes, as 64-bit words from the first on, the last filled up with zeros.
// dot_loop: how many operations it made, a product and a sum counted as two.
#define M4OV_LIMIT_KERNELS(X)         \
  X(uint64_t, read_bytes, ReadBytes) \
  X(int64_t, dot_loop, DotLoop)
