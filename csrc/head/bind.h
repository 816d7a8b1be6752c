// Python's way to the kernels of `head`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

// (hidden, weight, bias, target, class_weight, kept, scratch); (tokens, vocab, dim, hidden_row, weight_row, first,
// kept_rows).
using HeadAddresses = std::array<Address, 7>;
using HeadSizes = std::array<int64_t, 7>;

LinearLogprob linear_logprob(const HeadAddresses& at_, const HeadSizes& sizes, float temperature, float softcap,
                             bool rounded, int dtype, int threads) {
  const auto [hidden, weight, bias, target, class_weight, kept, scratch] = at_;
  const auto [tokens, vocab, dim, hidden_row, weight_row, first, kept_rows] = sizes;
  return {at<void>(hidden), at<void>(weight), at<void>(bias), at<int64_t>(target), at<float>(class_weight),
          tokens,           vocab,            dim,            hidden_row,          weight_row,
          first,            temperature,      softcap,        rounded,             at<void>(kept),
          kept_rows,        dtype,            threads,        at<char>(scratch)};
}

void bind_head(py::module_& m) {
  m.attr("HEAD_COLUMNS") = kHeadColumns;
  m.attr("HEAD_TOKENS") = kHeadTokens;
  m.attr("HEAD_TILE") = kHeadTile;
  m.def("linear_logprob_fwd", [](const HeadAddresses& inputs, const HeadSizes& sizes, float temperature, float softcap,
                                 bool rounded, int dtype, int threads, Address state, bool want_centred,
                                 bool want_total, int64_t top_k, Address top_values, Address top_indices) {
    return run<&Kernels::linear_logprob_fwd>(
        LinearLogprobFwd{linear_logprob(inputs, sizes, temperature, softcap, rounded, dtype, threads), at<float>(state),
                         want_centred, want_total, top_k, at<float>(top_values), at<int64_t>(top_indices)});
  });
  m.def("linear_logprob_bwd", [](const HeadAddresses& inputs, const HeadSizes& sizes, float temperature, float softcap,
                                 bool rounded, int dtype, int threads, Address coefficients, Address grad_hidden,
                                 Address grad_weight, Address grad_bias, int64_t columns) {
    return run<&Kernels::linear_logprob_bwd>(LinearLogprobBwd{
        linear_logprob(inputs, sizes, temperature, softcap, rounded, dtype, threads), at<float>(coefficients),
        at<void>(grad_hidden), at<void>(grad_weight), at<void>(grad_bias), columns});
  });
  m.def("linear_kl_fwd", [](const HeadAddresses& inputs, const HeadSizes& sizes, float temperature, float softcap,
                            bool rounded, int dtype, int threads, const HeadAddresses& others,
                            const HeadSizes& other_sizes, Address normalizer, Address state) {
    return run<&Kernels::linear_kl_fwd>(
        LinearKlFwd{linear_logprob(inputs, sizes, temperature, softcap, rounded, dtype, threads),
                    linear_logprob(others, other_sizes, temperature, softcap, rounded, dtype, threads),
                    at<float>(normalizer), at<float>(state)});
  });
  m.def("linear_kl_bwd", [](const HeadAddresses& inputs, const HeadSizes& sizes, float temperature, float softcap,
                            bool rounded, int dtype, int threads, const HeadAddresses& others,
                            const HeadSizes& other_sizes, int kind, Address coefficients, Address grad_hidden,
                            Address grad_weight, Address grad_bias, int64_t columns) {
    return run<&Kernels::linear_kl_bwd>(LinearKlBwd{
        {linear_logprob(inputs, sizes, temperature, softcap, rounded, dtype, threads), at<float>(coefficients),
         at<void>(grad_hidden), at<void>(grad_weight), at<void>(grad_bias), columns},
        linear_logprob(others, other_sizes, temperature, softcap, rounded, dtype, threads),
        kind});
  });
}

}  // namespace
}  // namespace m4ov
