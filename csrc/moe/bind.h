// Python's way to the kernels of `moe`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

void bind_moe(py::module_& m) {
  // (weights, experts, counts, probability, partials, row, logits); (tokens, count, logits_row, top_k, blocks).
  m.def("route_topk_fwd", [](const std::array<Address, 7>& addresses, const std::array<int64_t, 5>& sizes,
                             bool normalize, int dtype, int threads) {
    const auto [weights, experts, counts, probability, partials, row, logits] = addresses;
    const auto [tokens, count, logits_row, top_k, blocks] = sizes;
    run<&Kernels::route_topk_fwd>(RouteTopk{at<float>(weights), at<int32_t>(experts), at<int64_t>(counts),
                                            at<float>(probability), at<float>(partials), at<float>(row),
                                            at<void>(logits), tokens, count, logits_row, top_k, blocks, normalize,
                                            dtype, threads});
  });
  // (grad_logits, row, logits, weights, experts, grad_weights, grad_probability); (tokens, count, logits_row, top_k).
  m.def("route_topk_bwd", [](const std::array<Address, 7>& addresses, const std::array<int64_t, 4>& sizes,
                             bool normalize, int dtype, int threads) {
    const auto [grad_logits, row, logits, weights, experts, grad_weights, grad_probability] = addresses;
    const auto [tokens, count, logits_row, top_k] = sizes;
    run<&Kernels::route_topk_bwd>(RouteTopkBwd{at<void>(grad_logits), at<float>(row), at<void>(logits),
                                               at<float>(weights), at<int32_t>(experts), at<float>(grad_weights),
                                               at<float>(grad_probability), tokens, count, logits_row, top_k,
                                               normalize, dtype, threads});
  });
  // (rows, order, offsets, next, hidden_states, experts); (tokens, top_k, width, count, hidden_row).
  m.def("permute_fwd", [](const std::array<Address, 6>& addresses, const std::array<int64_t, 5>& sizes, int dtype,
                          int threads) {
    const auto [rows, order, offsets, next, hidden_states, experts] = addresses;
    const auto [tokens, top_k, width, count, hidden_row] = sizes;
    return run<&Kernels::permute_fwd>(Permute{at<void>(rows), at<int32_t>(order), at<int32_t>(offsets),
                                              at<int32_t>(next), at<void>(hidden_states), at<int32_t>(experts), tokens,
                                              top_k, width, count, hidden_row, dtype, threads});
  });
  // (output, seen, rows, order, weights); (tokens, top_k, width, row_stride).
  m.def("unpermute_fwd", [](const std::array<Address, 5>& addresses, const std::array<int64_t, 4>& sizes, int dtype,
                            int threads) {
    const auto [output, seen, rows, order, weights] = addresses;
    const auto [tokens, top_k, width, row_stride] = sizes;
    return run<&Kernels::unpermute_fwd>(Unpermute{at<void>(output), at<uint8_t>(seen), at<void>(rows),
                                                  at<int32_t>(order), at<float>(weights), tokens, top_k, width,
                                                  row_stride, dtype, threads});
  });
  // (grad_rows, grad_weights, seen, grad_output, rows, order, weights); (tokens, top_k, width, grad_stride, row_stride).
  m.def("unpermute_bwd", [](const std::array<Address, 7>& addresses, const std::array<int64_t, 5>& sizes, int dtype,
                            int threads) {
    const auto [grad_rows, grad_weights, seen, grad_output, rows, order, weights] = addresses;
    const auto [tokens, top_k, width, grad_stride, row_stride] = sizes;
    return run<&Kernels::unpermute_bwd>(UnpermuteBwd{at<void>(grad_rows), at<float>(grad_weights), at<uint8_t>(seen),
                                                     at<void>(grad_output), at<void>(rows), at<int32_t>(order),
                                                     at<float>(weights), tokens, top_k, width, grad_stride, row_stride,
                                                     dtype, threads});
  });
  // (output, rows, weight, offsets, scratch); (experts, columns, width, row_stride, weight_row, weight_expert).
  m.def("grouped_linear", [](const std::array<Address, 5>& addresses, const std::array<int64_t, 6>& sizes, bool across,
                             int dtype, int threads) {
    const auto [output, rows, weight, offsets, scratch] = addresses;
    const auto [experts, columns, width, row_stride, weight_row, weight_expert] = sizes;
    return run<&Kernels::grouped_linear>(GroupedLinear{at<void>(output), at<void>(rows), at<void>(weight),
                                                       at<int64_t>(offsets), experts, columns, width, row_stride,
                                                       weight_row, weight_expert, across, dtype, threads,
                                                       at<char>(scratch)});
  });
  // (grad_weight, grad_output, rows, offsets, scratch); (experts, columns, width, grad_stride, row_stride).
  m.def("grouped_linear_weight", [](const std::array<Address, 5>& addresses, const std::array<int64_t, 5>& sizes,
                                    int dtype, int threads) {
    const auto [grad_weight, grad_output, rows, offsets, scratch] = addresses;
    const auto [experts, columns, width, grad_stride, row_stride] = sizes;
    return run<&Kernels::grouped_linear_weight>(
        GroupedLinearWeight{at<void>(grad_weight), at<void>(grad_output), at<void>(rows), at<int64_t>(offsets), experts,
                            columns, width, grad_stride, row_stride, dtype, threads, at<char>(scratch)});
  });
}

}  // namespace
}  // namespace m4ov
