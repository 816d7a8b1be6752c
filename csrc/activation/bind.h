// Python's way to the kernels of `activation`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

void bind_activation(py::module_& m) {
  m.def("geglu_fwd", [](Address output, Address gate, Address up, int64_t rows, int64_t columns, int64_t gate_stride,
                        int64_t up_stride, bool tanh, int numerics, int dtype, int threads) {
    run<&Kernels::geglu_fwd>(GegluFwd{{at<void>(output), at<void>(gate), at<void>(up), rows, columns, gate_stride,
                                       up_stride, numerics, dtype, threads},
                                      tanh});
  });
  m.def("geglu_bwd", [](Address grad_gate, Address grad_up, Address grad_output, Address gate, Address up,
                        int64_t rows, int64_t columns, int64_t grad_stride, int64_t gate_stride, int64_t up_stride,
                        bool tanh, int dtype, int threads) {
    run<&Kernels::geglu_bwd>(GegluBwd{{at<void>(grad_gate), at<void>(grad_up), at<void>(grad_output), at<void>(gate),
                                       at<void>(up), rows, columns, grad_stride, gate_stride, up_stride, dtype,
                                       threads},
                                      tanh});
  });
  m.def("gelu_fwd", [](Address output, Address input, Address bias, int64_t rows, int64_t columns, int64_t input_stride,
                       bool tanh, int dtype, int threads) {
    run<&Kernels::gelu_fwd>(GeluFwd{at<void>(output), at<void>(input), at<void>(bias), rows, columns, input_stride,
                                    tanh, dtype, threads});
  });
  m.def("gelu_bwd", [](Address grad_input, Address grad_bias, Address partials, Address grad_output, Address input,
                       Address bias, int64_t rows, int64_t columns, int64_t grad_stride, int64_t input_stride,
                       int64_t blocks, bool tanh, int dtype, int threads) {
    run<&Kernels::gelu_bwd>(GeluBwd{at<void>(grad_input), at<void>(grad_bias), at<float>(partials),
                                    at<void>(grad_output), at<void>(input), at<void>(bias), rows, columns, grad_stride,
                                    input_stride, blocks, tanh, dtype, threads});
  });
  m.def("swiglu_fwd", [](Address output, Address gate, Address up, int64_t rows, int64_t columns, int64_t gate_stride,
                         int64_t up_stride, int numerics, int dtype, int threads) {
    run<&Kernels::swiglu_fwd>(GatedFwd{at<void>(output), at<void>(gate), at<void>(up), rows, columns, gate_stride,
                                        up_stride, numerics, dtype, threads});
  });
  m.def("swiglu_bwd", [](Address grad_gate, Address grad_up, Address grad_output, Address gate, Address up,
                         int64_t rows, int64_t columns, int64_t grad_stride, int64_t gate_stride, int64_t up_stride,
                         int dtype, int threads) {
    run<&Kernels::swiglu_bwd>(GatedBwd{at<void>(grad_gate), at<void>(grad_up), at<void>(grad_output), at<void>(gate),
                                        at<void>(up), rows, columns, grad_stride, gate_stride, up_stride, dtype,
                                        threads});
  });
}

}  // namespace
}  // namespace m4ov
