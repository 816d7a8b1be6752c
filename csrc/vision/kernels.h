// The arguments of the kernels of `vision`, and their list: X(result, function, arguments).
#pragma once

#include "../common/types.h"
#include "pack_patches.h"

#define M4OV_VISION_KERNELS(X) X(int64_t, pack_patches, PackPatches)
