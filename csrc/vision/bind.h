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

void bind_vision(py::module_& m) {
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

}  // namespace
}  // namespace m4ov
