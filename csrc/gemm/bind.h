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
}

}  // namespace
}  // namespace m4ov
