// Python's way to the kernels of `rope`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

void bind_rope(py::module_& m) {
  m.def("mrope_positions_scratch", mrope_positions_scratch);
  // Addresses: position_ids, deltas, kinds, cu_seqlens, image_grid, video_grid, intervals, scratch. Sizes: tokens,
  // samples, images, videos, image_kind, video_kind, merge_size.
  m.def("mrope_positions", [](const std::array<Address, 8>& tensors, const std::array<int64_t, 7>& sizes, bool typed,
                              bool narrow, int threads) {
    const auto [position_ids, deltas, kinds, cu_seqlens, image_grid, video_grid, intervals, scratch] = tensors;
    const auto [tokens, samples, images, videos, image_kind, video_kind, merge_size] = sizes;
    return run<&Kernels::mrope_positions>(MropePositions{
        at<int64_t>(position_ids), at<int64_t>(deltas), at<void>(kinds), at<int64_t>(cu_seqlens),
        at<int64_t>(image_grid), at<int64_t>(video_grid), at<float>(intervals), at<int64_t>(scratch), tokens, samples,
        images, videos, image_kind, video_kind, merge_size, typed, narrow, threads});
  });
}

}  // namespace
}  // namespace m4ov
