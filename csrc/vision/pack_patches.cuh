// Launcher of the CUDA kernels of pack_patches; plain C++, for bind.h.
#pragma once

#include "pack_patches.h"

namespace m4ov {

// Enqueues on `stream` (a cudaStream_t of the current device) and returns null, or what went wrong in words. `images` and
// all that it points to is device memory; `strips`, `strip_rows`, `threads` and `scratch` are not used. No host
// synchronisation.
const char* pack_patches_cuda(const PackPatches& arguments, void* stream);

}  // namespace m4ov
