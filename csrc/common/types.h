// Codes and sizes that Python, bind.cpp and the kernels agree on.
//
// In the argument structs (csrc/<family>/kernels.h) pointers are untyped because `dtype` is known only at run time.
// Inputs are `rows` dense rows, `*_stride` elements apart; outputs are contiguous, unless a struct says otherwise. No
// pointer needs more than its element's alignment.
#pragma once

#include <stdint.h>

namespace m4ov {

enum DType : int { kFloat32, kBFloat16, kFloat16 };
enum Numerics : int { kHf, kVllm, kFp32 };

constexpr int64_t kPartialAlign = 32;  // partial sums in scratch are padded to a multiple of so many

}  // namespace m4ov
