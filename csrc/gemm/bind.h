// Python's way to the kernels of `gemm`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"
#ifdef M4OV_WITH_CUDA
#include "int4_linear.cuh"
#endif

namespace m4ov {
namespace {

#ifdef M4OV_WITH_CUDA
void bind_gemm_cuda(py::module_& m) {
  // (output, input, codes, scales, zeros, bias, residual, partials, arrivals); (rows, columns, width, input_row,
  // residual_row, group, groups, blocks); on the current device.
  m.def("int4_linear_cuda", [](const std::array<Address, 9>& addresses, const std::array<int64_t, 8>& sizes,
                               int scale_dtype, int dtype, Address stream) {
    const auto [output, input, codes, scales, zeros, bias, residual, partials, arrivals] = addresses;
    const auto [rows, columns, width, input_row, residual_row, group, groups, blocks] = sizes;
    launch(int4_linear_cuda,
           Int4Linear{at<void>(output), at<void>(input), at<void>(codes), at<void>(scales), at<uint8_t>(zeros),
                      at<void>(bias), at<void>(residual), at<float>(partials), at<int>(arrivals), rows, columns, width,
                      input_row, residual_row, group, groups, blocks, scale_dtype, dtype},
           stream);
  });
  m.def("int4_linear_cuda_plan", [](int64_t rows, int64_t columns, int64_t width, int64_t multiprocessors) {
    const Int4LinearPlan plan = int4_linear_cuda_plan(rows, columns, width, multiprocessors);
    return std::array<int64_t, 3>{plan.blocks, plan.partials, plan.tiles};
  });
}
#endif

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
  m.def("quantize_rows", [](Address codes, Address scales, Address input, int64_t rows, int64_t columns,
                            int64_t input_stride, int64_t group, bool fp8, int dtype, int threads) {
    run<&Kernels::quantize_rows>(QuantizeRows{at<void>(codes), at<float>(scales), at<void>(input), rows, columns,
                                              input_stride, group, fp8, dtype, threads});
  });
  m.def("quantize_blocks", [](Address codes, Address transposed, Address scales, Address input, int64_t rows,
                              int64_t columns, int64_t input_stride, int dtype, int threads) {
    run<&Kernels::quantize_blocks>(QuantizeBlocks{at<void>(codes), at<void>(transposed), at<float>(scales),
                                                  at<void>(input), rows, columns, input_stride, dtype, threads});
  });
  m.def("rms_norm_quantize", [](Address codes, Address scales, Address new_residual, Address scratch,
                                Address hidden_states, Address weight, Address residual, int64_t rows, int64_t columns,
                                int64_t hidden_stride, int64_t residual_stride, float eps, bool fp8, int numerics,
                                int dtype, int threads) {
    run<&Kernels::rms_norm_quantize>(RmsNormQuantize{at<void>(codes), at<float>(scales), at<void>(new_residual),
                                                     at<char>(scratch), at<void>(hidden_states), at<void>(weight),
                                                     at<void>(residual), rows, columns, hidden_stride, residual_stride,
                                                     eps, fp8, numerics, dtype, threads});
  });
  m.def("swiglu_quantize", [](Address codes, Address scales, Address scratch, Address gate, Address up, int64_t rows,
                              int64_t columns, int64_t gate_stride, int64_t up_stride, bool fp8, int numerics,
                              int dtype, int threads) {
    run<&Kernels::swiglu_quantize>(SwigluQuantize{at<void>(codes), at<float>(scales), at<char>(scratch),
                                                  at<void>(gate), at<void>(up), rows, columns, gate_stride, up_stride,
                                                  fp8, numerics, dtype, threads});
  });
  m.def("requantize", [](Address codes, Address scales, Address scratch, Address weight, int64_t rows, int64_t columns,
                         int64_t weight_stride, int64_t group, int kind, int span, bool paired, int scale_dtype,
                         int dtype, int threads) {
    return run<&Kernels::requantize>(Requantize{at<uint8_t>(codes), at<void>(scales), at<float>(scratch),
                                                at<void>(weight), rows, columns, weight_stride, group, kind, span,
                                                paired, scale_dtype, dtype, threads});
  });
  m.def("pack_panels", [](Address panels, Address codes, int64_t rows, int64_t columns, int64_t row_stride,
                          int word_bytes, int flip, bool paired, int threads) {
    run<&Kernels::pack_panels>(PackPanels{at<uint8_t>(panels), at<uint8_t>(codes), rows, columns, row_stride,
                                          word_bytes, flip, paired, threads});
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
#ifdef M4OV_WITH_CUDA
  bind_gemm_cuda(m);
#endif
}

}  // namespace
}  // namespace m4ov
