// Python's way to the kernels of `packing`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace m4ov {
namespace {

void bind_packing(py::module_& m) {
  m.attr("largest_bin") = kLargestBin;
  m.def("pack_sequences_rooms", pack_sequences_rooms);
  m.def("pack_sequences", [](Address order, Address offsets, Address lengths, int64_t count, int64_t capacity,
                             Address scratch, Address rooms) {
    return run<&Kernels::pack_sequences>(PackSequences{at<int64_t>(order), at<int64_t>(offsets), at<int64_t>(lengths),
                                                       count, capacity, at<int64_t>(scratch), at<int64_t>(rooms)});
  });
}

}  // namespace
}  // namespace m4ov
