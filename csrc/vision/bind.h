// Python's way to the kernels of `vision`. Included by bind.cpp only.
#pragma once

#include "../common/bind.h"
#include "kernels.h"
#ifdef M4OV_WITH_CUDA
#include "pack_patches.cuh"
#endif

#include <sys/mman.h>

namespace m4ov {
namespace {

// Asks for huge pages where there is no memory yet: of a large new tensor the page faults take longer than the kernel.
void advise_huge_pages(Address address, int64_t bytes) {
  constexpr Address kPage = Address{2} << 20;
  const Address begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);  // where it fails, nothing is lost
}

void bind_pack_patches(py::module_& m) {
  using Three = std::array<float, 3>;
  m.def("advise_huge_pages", advise_huge_pages);
  m.attr("pack_image_fields") = sizeof(PackImage) / 8;
  // Returns the bytes of scratch that each thread needs if `scratch` is 0.
  m.def("pack_patches", [](Address output, Address images, int64_t count, int64_t patches, int64_t strips,
                           int64_t strip_rows, int64_t patch_size, int64_t temporal_patch_size, int64_t merge_size,
                           const Three& mean, const Three& std, int dtype, int threads, Address scratch) {
    return run<&Kernels::pack_patches>(PackPatches{at<void>(output), at<PackImage>(images), count, patches, strips,
                                                   strip_rows, 0, patch_size, temporal_patch_size, merge_size,
                                                   {mean[0], mean[1], mean[2]}, {std[0], std[1], std[2]}, dtype,
                                                   threads, at<char>(scratch)});
  });
#ifdef M4OV_WITH_CUDA
  // `images`, and whatever it points to, lies on the device.
  m.def("pack_patches_cuda",
        [](Address output, Address images, int64_t count, int64_t patches, int64_t between_bytes, int64_t patch_size,
           int64_t temporal_patch_size, int64_t merge_size, const Three& mean, const Three& std, int dtype,
           Address stream) {
          launch(pack_patches_cuda,
                 PackPatches{at<void>(output), at<PackImage>(images), count, patches, 0, 0, between_bytes, patch_size,
                             temporal_patch_size, merge_size, {mean[0], mean[1], mean[2]}, {std[0], std[1], std[2]},
                             dtype, 0, nullptr},
                 stream);
        });
#endif
}

template <auto kKernel>
int64_t feature_rows(Address output, Address source, Address base, Address features, Address positions, int64_t rows,
                     int64_t count, int64_t columns, int64_t base_stride, int64_t features_stride, int dtype,
                     int threads) {
  return run<kKernel>(FeatureRows{at<void>(output), at<int64_t>(source), at<void>(base), at<void>(features),
                                  at<int64_t>(positions), rows, count, columns, base_stride, features_stride, dtype,
                                  threads});
}

void bind_vision(py::module_& m) {
  bind_pack_patches(m);
  m.def("scatter_vision_fwd", feature_rows<&Kernels::scatter_vision_fwd>);
  m.def("deepstack_add_fwd", feature_rows<&Kernels::deepstack_add_fwd>);
  m.def("scatter_vision_bwd", [](Address grad_base, Address grad_features, Address source, Address grad_output,
                                 Address positions, int64_t rows, int64_t count, int64_t columns, int64_t grad_stride,
                                 int dtype, int threads) {
    return run<&Kernels::scatter_vision_bwd>(
        FeatureRowsBwd{at<void>(grad_base), at<void>(grad_features), at<int64_t>(source), at<void>(grad_output),
                       at<int64_t>(positions), rows, count, columns, grad_stride, dtype, threads});
  });
  m.def("interpolate_fwd", [](Address output, Address table, Address hidden_states, Address grid_thw, int64_t images,
                              int64_t patches, int64_t columns, int64_t side, int64_t hidden_stride,
                              int64_t merge_size, int numerics, int dtype, int threads) {
    return run<&Kernels::interpolate_fwd>(InterpolateFwd{
        at<void>(output), at<void>(table), at<void>(hidden_states), at<int64_t>(grid_thw), images, patches, columns,
        side, hidden_stride, merge_size, numerics, dtype, threads});
  });
  m.attr("sums_columns") = kSumsColumns;
  m.def("interpolate_bwd", [](Address grad_table, Address sums, Address grad_output, Address grid_thw, int64_t images,
                              int64_t patches, int64_t columns, int64_t side, int64_t grad_stride, int64_t merge_size,
                              int64_t sums_columns, int dtype, int threads) {
    return run<&Kernels::interpolate_bwd>(InterpolateBwd{at<void>(grad_table), at<float>(sums), at<void>(grad_output),
                                                         at<int64_t>(grid_thw), images, patches, columns, side,
                                                         grad_stride, merge_size, sums_columns, dtype, threads});
  });
}

}  // namespace
}  // namespace m4ov
