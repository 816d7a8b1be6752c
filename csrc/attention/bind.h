// Python's way to the kernels of `attention`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

// (q, k, v, bounds_q, bounds_k, scratch); (sequences, tokens_q, tokens_k, heads, kv_heads, dim); row and head strides
// of q, k and v.
using Addresses = std::array<Address, 6>;
using Sizes = std::array<int64_t, 6>;

VarlenAttention varlen_attention(const Addresses& at_, const Sizes& sizes, const Sizes& strides, float scale,
                                 bool causal, int dtype, int threads) {
  const auto [q, k, v, bounds_q, bounds_k, scratch] = at_;
  const auto [sequences, tokens_q, tokens_k, heads, kv_heads, dim] = sizes;
  return {at<void>(q),       at<void>(k), at<void>(v), at<int64_t>(bounds_q), at<int64_t>(bounds_k),
          sequences,         tokens_q,    tokens_k,    heads,                 kv_heads,
          dim,               strides[0],  strides[1],  strides[2],            strides[3],
          strides[4],        strides[5],  scale,       causal,                dtype,
          threads,           at<char>(scratch)};
}

void bind_attention(py::module_& m) {
  m.def("varlen_attention_fwd", [](const Addresses& inputs, const Sizes& sizes, const Sizes& strides, float scale,
                                   bool causal, int dtype, int threads, Address output, Address normalizer) {
    return run<&Kernels::varlen_attention_fwd>(VarlenAttentionFwd{
        varlen_attention(inputs, sizes, strides, scale, causal, dtype, threads), at<void>(output), at<float>(normalizer)});
  });
  m.def("varlen_attention_bwd", [](const Addresses& inputs, const Sizes& sizes, const Sizes& strides, float scale,
                                   bool causal, int dtype, int threads, const Addresses& tensors, int64_t grad_row,
                                   int64_t grad_head) {
    const auto [grad_q, grad_k, grad_v, grad_output, output, normalizer] = tensors;
    return run<&Kernels::varlen_attention_bwd>(VarlenAttentionBwd{
        varlen_attention(inputs, sizes, strides, scale, causal, dtype, threads), at<void>(grad_q), at<void>(grad_k),
        at<void>(grad_v), at<void>(grad_output), at<void>(output), at<float>(normalizer), grad_row, grad_head});
  });
  // (output, q, k, v, prefix_first, prefix_keys, own_first, own_keys, scratch); (rows, heads, kv_heads, dim).
  m.def("decode_attention", [](const std::array<Address, 9>& addresses, const std::array<int64_t, 4>& sizes,
                               float scale, int dtype, int threads) {
    const auto [output, q, k, v, prefix_first, prefix_keys, own_first, own_keys, scratch] = addresses;
    const auto [rows, heads, kv_heads, dim] = sizes;
    return run<&Kernels::decode_attention>(DecodeAttention{
        at<void>(output), at<void>(q), at<void>(k), at<void>(v), at<int64_t>(prefix_first), at<int64_t>(prefix_keys),
        at<int64_t>(own_first), at<int64_t>(own_keys), rows, heads, kv_heads, dim, scale, dtype, threads,
        at<char>(scratch)});
  });
}

}  // namespace
}  // namespace m4ov
