// The arguments of the kernels of `packing`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"

namespace m4ov {

// Best-fit decreasing; lengths from 0 to capacity, capacity from 1 to kLargestBin.
struct PackSequences {
  int64_t* order;    // [count]: the sequences, bin after bin
  int64_t* offsets;  // [count + 1]: bin b holds order[offsets[b]] to order[offsets[b + 1]]
  const int64_t* lengths;  // [count]
  int64_t count, capacity;
  int64_t* scratch;  // [3 * count]
  int64_t* rooms;    // [pack_sequences_rooms()], zeros
};

constexpr int64_t kLargestBin = int64_t{1} << 24;

// For every room that a bin may have left a number, and bits above them in steps of 64.
inline int64_t pack_sequences_rooms(int64_t capacity) { return capacity + 1 + capacity / 63 + 8; }

}  // namespace m4ov

// pack_sequences: how many bins.
#define M4OV_PACKING_KERNELS(X) X(int64_t, pack_sequences, PackSequences)
