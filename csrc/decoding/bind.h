// Python's way to the kernels of `decoding`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

void bind_decoding(py::module_& m) {
  m.attr("decode_layer_pointers") = kDecodeLayerPointers;
  // (normed, embedding, norm, layers, tokens, positions, prefix_first, prefix_keys, own_first, own_keys, inv_freq,
  // scratch); (rows, depth, width, heads, kv_heads, dim, inner).
  m.def("decode_step", [](const std::array<Address, 12>& addresses, const std::array<int64_t, 7>& sizes, double eps,
                          float scale, int dtype, int threads) {
    const auto [normed, embedding, norm, layers, tokens, positions, prefix_first, prefix_keys, own_first, own_keys,
                inv_freq, scratch] = addresses;
    const auto [rows, depth, width, heads, kv_heads, dim, inner] = sizes;
    return run<&Kernels::decode_step>(DecodeStep{
        at<void>(normed), at<void>(embedding), at<void>(norm), at<DecodeLayer>(layers), at<int64_t>(tokens),
        at<int64_t>(positions), at<int64_t>(prefix_first), at<int64_t>(prefix_keys), at<int64_t>(own_first),
        at<int64_t>(own_keys), at<double>(inv_freq), rows, depth, width, heads, kv_heads, dim, inner, eps, scale, dtype,
        threads, at<char>(scratch)});
  });
  // (tokens, logits, column, largest, draws, scratch); (rows, vocab, stride).
  m.def("choose_tokens", [](const std::array<Address, 6>& addresses, const std::array<int64_t, 3>& sizes, int threads) {
    const auto [tokens, logits, column, largest, draws, scratch] = addresses;
    const auto [rows, vocab, stride] = sizes;
    return run<&Kernels::choose_tokens>(ChooseTokens{at<int64_t>(tokens), at<float>(logits), at<int64_t>(column),
                                                     at<float>(largest), at<double>(draws), rows, vocab, stride,
                                                     threads, at<char>(scratch)});
  });
}

}  // namespace
}  // namespace m4ov
