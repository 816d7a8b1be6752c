// Python's way to the kernels of `activation`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

void bind_activation(py::module_& m) {
  m.def("swiglu_fwd", [](Address output, Address gate, Address up, int64_t rows, int64_t columns, int64_t gate_stride,
                         int64_t up_stride, int numerics, int dtype, int threads) {
    run<&Kernels::swiglu_fwd>(SwigluFwd{at<void>(output), at<void>(gate), at<void>(up), rows, columns, gate_stride,
                                        up_stride, numerics, dtype, threads});
  });
  m.def("swiglu_bwd", [](Address grad_gate, Address grad_up, Address grad_output, Address gate, Address up,
                         int64_t rows, int64_t columns, int64_t grad_stride, int64_t gate_stride, int64_t up_stride,
                         int dtype, int threads) {
    run<&Kernels::swiglu_bwd>(SwigluBwd{at<void>(grad_gate), at<void>(grad_up), at<void>(grad_output), at<void>(gate),
                                        at<void>(up), rows, columns, grad_stride, gate_stride, up_stride, dtype,
                                        threads});
  });
}

}  // namespace
}  // namespace m4ov
