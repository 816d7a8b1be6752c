// The Python module m4ov_kernels._C. Tensors cross as addresses, sizes and strides (in elements); the callers in
// m4ov_kernels/*/native.py have checked them and own the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "common/kernels.h"
#ifdef M4OV_WITH_CUDA
#include "norm/rms_norm.cuh"
#endif

namespace py = pybind11;

namespace m4ov {
namespace {

using Address = uintptr_t;

#define M4OV_KERNELS(variant)                                                                            \
  {                                                                                                      \
    variant::rms_norm_fwd, variant::rms_norm_bwd, variant::swiglu_fwd, variant::swiglu_bwd,              \
        variant::cross_entropy_fwd, variant::cross_entropy_bwd, variant::accumulate,                     \
        variant::varlen_attention_fwd, variant::varlen_attention_bwd                                     \
  }
const Kernels kTables[kIsaCount] = {M4OV_KERNELS(baseline), M4OV_KERNELS(avx2), M4OV_KERNELS(avx512),
                                    M4OV_KERNELS(avx512_bf16)};
#undef M4OV_KERNELS

std::atomic<int> chosen{-1};

std::string supported_names() {
  std::string names;
  for (int i = 0; i <= detect_isa(); ++i) names += (i ? ", " : "") + std::string(kIsaNames[i]);
  return names;
}

Isa isa_named(const std::string& name, const std::string& source) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name != kIsaNames[i]) continue;
    if (i > detect_isa()) {
      throw py::value_error(source + ": this processor does not support " + name + ", only " + supported_names());
    }
    return static_cast<Isa>(i);
  }
  throw py::value_error(source + ": unknown instruction set '" + name + "'; expected one of " + supported_names());
}

// Decided at the first use and not at import, so that a bad M4OV_ISA is an error of the call and not a missing module.
int current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    const char* wanted = std::getenv("M4OV_ISA");
    isa = wanted && *wanted ? isa_named(wanted, "M4OV_ISA") : detect_isa();
    chosen.store(isa, std::memory_order_relaxed);
  }
  return isa;
}

template <auto kKernel, typename Arguments>
auto run(const Arguments& arguments) {
  const Kernels& table = kTables[current_isa()];
  py::gil_scoped_release release;
  return (table.*kKernel)(arguments);
}

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_cpu(py::module_& m) {
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
}

#ifdef M4OV_WITH_CUDA
template <typename Arguments>
void launch(const char* (*launcher)(const Arguments&, void*), const Arguments& arguments, Address stream) {
  const char* error;
  {
    py::gil_scoped_release release;
    error = launcher(arguments, at<void>(stream));
  }
  if (error) throw std::runtime_error(error);
}

// The same arguments as on the CPU, with a stream for the number of threads; on the current device.
void bind_cuda(py::module_& m) {
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

py::list supported_isas() {
  py::list names;
  for (int i = 0; i <= detect_isa(); ++i) names.append(kIsaNames[i]);
  return names;
}

py::list cuda_targets() {
  py::list targets;
#ifdef M4OV_WITH_CUDA
  std::string all = M4OV_CUDA_TARGETS;  // "sm_80,sm_90a"
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = all.find(',', begin) == std::string::npos ? all.size() : all.find(',', begin);
    targets.append(all.substr(begin, end - begin));
    begin = end + 1;
  }
#endif
  return targets;
}

}  // namespace
}  // namespace m4ov

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of m4ov_kernels. Import torch first: it brings the OpenMP runtime that both share.";
  m.def("isa", [] { return m4ov::kIsaNames[m4ov::current_isa()]; }, "The instruction set that kernels run with.");
  m.def("isas", m4ov::supported_isas, "The instruction sets that this machine can run, ascending.");
  m.def(
      "set_isa", [](const std::string& name) { m4ov::chosen = m4ov::isa_named(name, "set_isa"); },
      "Run kernels with this instruction set from now on, in the whole process; ValueError if it cannot.");
  m.def("cuda_targets", m4ov::cuda_targets, "What the CUDA kernels were compiled for; empty without them.");
  m.def("compiler", [] { return M4OV_COMPILER; }, "The compiler that built this module.");
  m.attr("partial_align") = m4ov::kPartialAlign;
  m4ov::bind_cpu(m);
  m4ov::bind_attention(m);
#ifdef M4OV_WITH_CUDA
  m4ov::bind_cuda(m);
#endif
}
