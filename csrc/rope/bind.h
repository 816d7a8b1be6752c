// Python's way to the kernels of `rope`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

// (positions, grid, inv_freq, axis); (axis_stride, token_stride, images, merge_size, axes, wide, single).
RopeAngles rope_angles(const std::array<Address, 4>& at_, const std::array<int64_t, 7>& sizes) {
  const auto [positions, grid, inv_freq, axis] = at_;
  const auto [axis_stride, token_stride, images, merge_size, axes, wide, single] = sizes;
  return {at<void>(positions), axis_stride,      token_stride, at<int64_t>(grid),      images,
          merge_size,          at<double>(inv_freq), at<int32_t>(axis), axes, static_cast<int>(wide),
          static_cast<int>(single)};
}

// Of each tensor its output, input and weight, and (heads, token_stride, head_stride).
void bind_rope(py::module_& m) {
  using Tensors = std::array<std::array<Address, 3>, 2>;
  using Strides = std::array<std::array<int64_t, 3>, 2>;
  m.def("rope_fwd", [](const std::array<Address, 4>& sources, const std::array<int64_t, 7>& sizes,
                       const Tensors& tensors, const Strides& strides, int64_t tokens, int64_t dim, int64_t half,
                       double eps, int numerics, int dtype, int threads) {
    RopeFwd a{rope_angles(sources, sizes), {}, tokens, dim, half, eps, numerics, dtype, threads};
    for (int i = 0; i < 2; ++i) {
      const auto [output, input, weight] = tensors[i];
      const auto [heads, token_stride, head_stride] = strides[i];
      a.tensors[i] = {at<void>(output), at<void>(input), at<void>(weight), heads, token_stride, head_stride};
    }
    run<&Kernels::rope_fwd>(a);
  });
  // Of each tensor grad_input, grad_weight, grad_output, input, weight, and (heads, the gradient's two strides, the
  // input's two).
  using GradTensors = std::array<std::array<Address, 5>, 2>;
  using GradStrides = std::array<std::array<int64_t, 5>, 2>;
  m.def("rope_bwd", [](const std::array<Address, 4>& sources, const std::array<int64_t, 7>& sizes,
                       const GradTensors& tensors, const GradStrides& strides, Address partials, int64_t tokens,
                       int64_t dim, int64_t half, int64_t blocks, double eps, int dtype, int threads) {
    RopeBwd a{rope_angles(sources, sizes), {}, at<float>(partials), tokens, dim, half, blocks, eps, dtype, threads};
    for (int i = 0; i < 2; ++i) {
      const auto [grad_input, grad_weight, grad_output, input, weight] = tensors[i];
      const auto [heads, grad_token, grad_head, token, head] = strides[i];
      a.tensors[i] = {at<void>(grad_input), at<void>(grad_weight), at<void>(grad_output), at<void>(input),
                      at<void>(weight),     heads,                 grad_token,            grad_head,
                      token,                head};
    }
    run<&Kernels::rope_bwd>(a);
  });
  m.def("rope_partial", rope_partial, "How many floats a partial gradient of a weight of this width takes.");
  m.attr("max_rope_dim") = kMaxRopeDim;
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
