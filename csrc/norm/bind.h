// Python's way to the kernels of `norm`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"
#ifdef M4OV_WITH_CUDA
#include "rms_norm.cuh"
#endif

namespace m4ov {
namespace {

#ifdef M4OV_WITH_CUDA
// The same arguments as on the CPU, with a stream for the number of threads; on the current device.
void bind_norm_cuda(py::module_& m) {
  m.def("rms_norm_fwd_cuda",
        [](Address normed, Address new_residual, Address rstd, Address hidden_states, Address weight, Address residual,
           int64_t rows, int64_t columns, int64_t hidden_stride, int64_t residual_stride, float eps, int numerics,
           int dtype, Address stream) {
          launch(rms_norm_fwd_cuda,
                 RmsNormFwd{at<void>(normed), at<void>(new_residual), at<float>(rstd), at<void>(hidden_states),
                            at<void>(weight), at<void>(residual), rows, columns, hidden_stride, residual_stride, eps,
                            numerics, dtype, 0},
                 stream);
        });
  m.def("rms_norm_bwd_cuda",
        [](Address grad_hidden_states, Address grad_weight, Address partials, Address grad_normed,
           Address grad_residual, Address hidden_states, Address weight, Address rstd, int64_t rows, int64_t columns,
           int64_t grad_stride, int64_t grad_residual_stride, int64_t hidden_stride, int64_t blocks, int dtype,
           Address stream) {
          launch(rms_norm_bwd_cuda,
                 RmsNormBwd{at<void>(grad_hidden_states), at<void>(grad_weight), at<float>(partials),
                            at<void>(grad_normed), at<void>(grad_residual), at<void>(hidden_states), at<void>(weight),
                            at<float>(rstd), rows, columns, grad_stride, grad_residual_stride, hidden_stride, blocks,
                            dtype, 0},
                 stream);
        });
  m.def("rms_norm_bwd_cuda_blocks", rms_norm_bwd_cuda_blocks);
}
#endif

void bind_norm(py::module_& m) {
  m.def("layer_norm_fwd",
        [](Address normed, Address new_residual, Address mean, Address rstd, Address hidden_states, Address weight,
           Address bias, Address residual, int64_t rows, int64_t columns, int64_t hidden_stride,
           int64_t residual_stride, float eps, int numerics, int dtype, int threads) {
          run<&Kernels::layer_norm_fwd>(LayerNormFwd{at<void>(normed), at<void>(new_residual), at<float>(mean),
                                                     at<float>(rstd), at<void>(hidden_states), at<void>(weight),
                                                     at<void>(bias), at<void>(residual), rows, columns, hidden_stride,
                                                     residual_stride, eps, numerics, dtype, threads});
        });
  m.def("layer_norm_bwd",
        [](Address grad_hidden_states, Address grad_weight, Address grad_bias, Address partials, Address grad_normed,
           Address grad_residual, Address hidden_states, Address weight, Address mean, Address rstd, int64_t rows,
           int64_t columns, int64_t grad_stride, int64_t grad_residual_stride, int64_t hidden_stride, int64_t blocks,
           int dtype, int threads) {
          run<&Kernels::layer_norm_bwd>(LayerNormBwd{
              at<void>(grad_hidden_states), at<void>(grad_weight), at<void>(grad_bias), at<float>(partials),
              at<void>(grad_normed), at<void>(grad_residual), at<void>(hidden_states), at<void>(weight),
              at<float>(mean), at<float>(rstd), rows, columns, grad_stride, grad_residual_stride, hidden_stride, blocks,
              dtype, threads});
        });
  m.def("rms_norm_fwd",
        [](Address normed, Address new_residual, Address rstd, Address hidden_states, Address weight, Address residual,
           int64_t rows, int64_t columns, int64_t hidden_stride, int64_t residual_stride, float eps, int numerics,
           int dtype, int threads) {
          run<&Kernels::rms_norm_fwd>(RmsNormFwd{at<void>(normed), at<void>(new_residual), at<float>(rstd),
                                                 at<void>(hidden_states), at<void>(weight), at<void>(residual), rows,
                                                 columns, hidden_stride, residual_stride, eps, numerics, dtype,
                                                 threads});
        });
  m.def("rms_norm_bwd",
        [](Address grad_hidden_states, Address grad_weight, Address partials, Address grad_normed,
           Address grad_residual, Address hidden_states, Address weight, Address rstd, int64_t rows, int64_t columns,
           int64_t grad_stride, int64_t grad_residual_stride, int64_t hidden_stride, int64_t blocks, int dtype,
           int threads) {
          run<&Kernels::rms_norm_bwd>(RmsNormBwd{at<void>(grad_hidden_states), at<void>(grad_weight),
                                                 at<float>(partials), at<void>(grad_normed), at<void>(grad_residual),
                                                 at<void>(hidden_states), at<void>(weight), at<float>(rstd), rows,
                                                 columns, grad_stride, grad_residual_stride, hidden_stride, blocks,
                                                 dtype, threads});
        });
#ifdef M4OV_WITH_CUDA
  bind_norm_cuda(m);
#endif
}

}  // namespace
}  // namespace m4ov
