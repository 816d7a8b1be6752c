// Python's way to the kernels of `head`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

void bind_head(py::module_& m) {
  m.def("cross_entropy_fwd", [](Address state, Address logits, Address target, int64_t rows, int64_t columns,
                                int64_t logits_stride, int64_t first, bool want_total, int dtype, int threads) {
    run<&Kernels::cross_entropy_fwd>(CrossEntropyFwd{at<float>(state), at<void>(logits), at<int64_t>(target), rows,
                                                     columns, logits_stride, first, want_total, dtype, threads});
  });
  m.def("cross_entropy_bwd",
        [](Address gradient, Address logits, Address target, Address normalizer, Address grad_loss, int64_t rows,
           int64_t columns, int64_t logits_stride, int64_t first, float target_weight, float uniform_weight, int dtype,
           int threads) {
          run<&Kernels::cross_entropy_bwd>(CrossEntropyBwd{
              at<void>(gradient), at<void>(logits), at<int64_t>(target), at<float>(normalizer), at<float>(grad_loss),
              rows, columns, logits_stride, first, target_weight, uniform_weight, dtype, threads});
        });
  m.def("accumulate", [](Address accumulator, Address output, Address addend, int64_t count, bool assign, int dtype,
                         int threads) {
    run<&Kernels::accumulate>(
        Accumulate{at<float>(accumulator), at<void>(output), at<void>(addend), count, assign, dtype, threads});
  });
}

}  // namespace
}  // namespace m4ov
