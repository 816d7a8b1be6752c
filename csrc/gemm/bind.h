// Python's way to the kernels of `gemm`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

void bind_gemm(py::module_& m) {
  // (input, weight, bias, output, scratch); (tokens, columns, width, input_row, weight_row).
  m.def("invariant_linear", [](const std::array<Address, 5>& addresses, const std::array<int64_t, 5>& sizes,
                               bool transposed, int dtype, int threads) {
    const auto [input, weight, bias, output, scratch] = addresses;
    const auto [tokens, columns, width, input_row, weight_row] = sizes;
    return run<&Kernels::invariant_linear>(InvariantLinear{at<void>(input), at<void>(weight), at<void>(bias),
                                                           at<void>(output), tokens, columns, width, input_row,
                                                           weight_row, transposed, dtype, threads, at<char>(scratch)});
  });

  // (input, codes, scales, zeros, order, input_scale, bias, residual, output, scratch); (tokens, columns, width, places,
  // group, groups, input_row, residual_row); (kind, activation, epilogue, scale_dtype, dtype, threads).
  m.def("quantized_linear", [](const std::array<Address, 10>& addresses, const std::array<int64_t, 8>& sizes,
                               const std::array<int, 6>& codes) {
    const auto [input, panels, scales, zeros, order, input_scale, bias, residual, output, scratch] = addresses;
    const auto [tokens, columns, width, places, group, groups, input_row, residual_row] = sizes;
    const auto [kind, activation, epilogue, scale_dtype, dtype, threads] = codes;
    return run<&Kernels::quantized_linear>(QuantizedLinear{
        at<void>(input), at<uint8_t>(panels), at<void>(scales), at<uint8_t>(zeros), at<int32_t>(order),
        at<float>(input_scale), at<void>(bias), at<void>(residual), at<void>(output), tokens, columns, width, places,
        group, groups, input_row, residual_row, kind, activation, epilogue, scale_dtype, dtype, threads,
        at<char>(scratch)});
  });
}

}  // namespace
}  // namespace m4ov
