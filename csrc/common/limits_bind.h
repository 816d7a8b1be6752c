// Python's way to the loops that benchmarks are held against. Included by bind.cpp only.
#pragma once

#include "bind.h"
#include "limits.h"

namespace m4ov {
namespace {

void bind_limits(py::module_& m) {
  m.def("read_bytes", [](Address from, int64_t bytes, int threads) {
    return run<&Kernels::read_bytes>(ReadBytes{at<void>(from), bytes, threads});
  });
  m.def("dot_loop", [](const std::string& kind, int64_t steps, int threads) {
    if (kind != "int8" && kind != "bf16") throw py::value_error("dot_loop: expected int8 or bf16, not '" + kind + "'");
    return run<&Kernels::dot_loop>(DotLoop{kind == "int8" ? kDotInt8 : kDotBf16, steps, threads});
  });
}

}  // namespace
}  // namespace m4ov
