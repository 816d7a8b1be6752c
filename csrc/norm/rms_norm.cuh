// Launchers of the CUDA kernels of rms_norm; plain C++, for bind.cpp.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace m4ov {

// Enqueue on `stream` (a cudaStream_t of the current device) and return null, or what went wrong in words. Pointers are
// device memory; `threads` is not used. No host synchronisation.
const char* rms_norm_fwd_cuda(const RmsNormFwd& arguments, void* stream);

// `partials` is 16-byte aligned. `blocks` is from 1 to max(rows, 1); take rms_norm_bwd_cuda_blocks(rows, columns).
const char* rms_norm_bwd_cuda(const RmsNormBwd& arguments, void* stream);

// How many partial sums of grad_weight: a function of the shape alone, at least 1.
int64_t rms_norm_bwd_cuda_blocks(int64_t rows, int64_t columns);

}  // namespace m4ov
