// The Python module m4ov_kernels._C. Tensors cross as addresses, sizes and strides (in elements); the callers in
// m4ov_kernels/*/native.py have checked them and own the memory.
#include "activation/bind.h"
#include "attention/bind.h"
#include "common/limits_bind.h"
#include "decoding/bind.h"
#include "gemm/bind.h"
#include "head/bind.h"
#include "moe/bind.h"
#include "norm/bind.h"
#include "packing/bind.h"
#include "rope/bind.h"
#include "vision/bind.h"

namespace m4ov {
namespace {

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
  m4ov::bind_activation(m);
  m4ov::bind_attention(m);
  m4ov::bind_decoding(m);
  m4ov::bind_gemm(m);
  m4ov::bind_head(m);
  m4ov::bind_limits(m);
  m4ov::bind_moe(m);
  m4ov::bind_norm(m);
  m4ov::bind_packing(m);
  m4ov::bind_rope(m);
  m4ov::bind_vision(m);
}
