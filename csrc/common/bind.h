// What the families' bind.h share: how tensors cross from Python, and which instruction set's kernels run.
// Included in one translation unit only, bind.cpp's.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"

namespace m4ov {
namespace {

namespace py = pybind11;

using Address = uintptr_t;

#define M4OV_BASELINE(result, function, arguments) baseline::function,
#define M4OV_AVX2(result, function, arguments) avx2::function,
#define M4OV_AVX512(result, function, arguments) avx512::function,
#define M4OV_AVX512_BF16(result, function, arguments) avx512_bf16::function,
const Kernels kTables[kIsaCount] = {{M4OV_KERNELS(M4OV_BASELINE)},
                                    {M4OV_KERNELS(M4OV_AVX2)},
                                    {M4OV_KERNELS(M4OV_AVX512)},
                                    {M4OV_KERNELS(M4OV_AVX512_BF16)}};
#undef M4OV_BASELINE
#undef M4OV_AVX2
#undef M4OV_AVX512
#undef M4OV_AVX512_BF16

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
#endif

}  // namespace
}  // namespace m4ov
