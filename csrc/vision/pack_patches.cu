// pack_patches on a GPU, in the integers of the CPU's kernels. An image that is resized in both directions takes two
// kernels, because the first direction is rounded to eight bits; the second one also normalises and writes patches.
#include "../common/cuda.cuh"
#include "pack_patches.cuh"

namespace m4ov {
namespace {

constexpr int kThreads = 256;
constexpr int kFractionBits = 22, kSplitBits = 12;  // of the weights, as in bytes.h

// The first 16 bits of `pair`, and the other 16, signed.
__device__ __forceinline__ int first_of(int pair) { return static_cast<int16_t>(pair & 0xffff); }
__device__ __forceinline__ int second_of(int pair) { return pair >> 16; }

// A resized pixel: the sum of the old ones that `window` (a Window of bytes.h) lists, `stride` bytes apart from `p` on,
// of which there are `size`.
__device__ __forceinline__ int weighted(const int32_t* window, const uint8_t* p, int64_t stride, int64_t size) {
  const int start = __ldg(window), pairs = __ldg(window + 1);
  int low = 1 << (kFractionBits - 1), high = 0;
#pragma unroll 2
  for (int pair = 0; pair < pairs; ++pair) {
    const int64_t i = start + 2 * pair;
    const int a = __ldg(p + i * stride), b = __ldg(p + (i + 1 < size ? i + 1 : i) * stride);
    const int low_weights = __ldg(window + 2 + 2 * pair), high_weights = __ldg(window + 3 + 2 * pair);
    low += a * first_of(low_weights) + b * second_of(low_weights);
    high += a * first_of(high_weights) + b * second_of(high_weights);
  }
  const int value = (low + high * (1 << kSplitBits)) >> kFractionBits;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

__device__ __forceinline__ bool resized_twice(const PackImage& image) {
  return image.vertical != nullptr && image.horizontal != nullptr;
}

// The first of two directions: `between` becomes [height, resized_width, channels], or, vertical_first,
// [resized_height, width, channels]. Each image has as many blocks; a block takes rows.
__global__ void __launch_bounds__(kThreads) resize_between_kernel(const PackPatches a) {
  const int64_t blocks = gridDim.x / a.count;
  const PackImage image = a.images[blockIdx.x / blocks];
  if (!resized_twice(image)) return;
  const int64_t rows = image.vertical_first ? image.resized_height : image.height;
  const int channels = static_cast<int>(image.channels);
  const int elements = static_cast<int>(image.vertical_first ? image.width : image.resized_width) * channels;
  for (int64_t y = blockIdx.x % blocks; y < rows; y += blocks) {
    for (int i = threadIdx.x; i < elements; i += kThreads) {
      const int64_t x = i / channels, c = i % channels;
      const uint8_t* source = image.source + c * image.channel;
      const int value = image.vertical_first
                            ? weighted(image.vertical + y * image.vertical_window, source + x * image.pixel, image.row,
                                       image.height)
                            : weighted(image.horizontal + x * image.horizontal_window, source + y * image.row,
                                       image.pixel, image.width);
      image.between[y * elements + i] = static_cast<uint8_t>(value);
    }
  }
}

// Pixel (y, x) of one channel of the resized image.
__device__ __forceinline__ int resized(const PackImage& image, int64_t y, int64_t x, int64_t c) {
  const bool twice = resized_twice(image), down = image.vertical != nullptr && !(twice && image.vertical_first);
  const bool across = image.horizontal != nullptr && !down;
  const int64_t row = twice ? (down ? image.resized_width : image.width) * image.channels : image.row;
  const int64_t pixel = twice ? image.channels : image.pixel;
  const uint8_t* p = twice ? image.between + c : image.source + c * image.channel;
  // Along the direction that is still to be resized, `p` stays at the first pixel.
  if (!down) p += y * row;
  if (!across) p += x * pixel;
  if (down) return weighted(image.vertical + y * image.vertical_window, p, row, image.height);
  if (across) return weighted(image.horizontal + x * image.horizontal_window, p, pixel, image.width);
  return __ldg(p);
}

// Each image has as many blocks; a block takes patches.
template <typename T>
__global__ void __launch_bounds__(kThreads) pack_patches_kernel(const PackPatches a) {
  const int64_t blocks = gridDim.x / a.count;
  const PackImage image = a.images[blockIdx.x / blocks];
  const int size = static_cast<int>(a.patch_size), square = size * size;
  const int64_t merge = a.merge_size, across = image.resized_width / size;
  const int64_t patches = image.resized_height / size * across;
  for (int64_t patch = blockIdx.x % blocks; patch < patches; patch += blocks) {
    const int64_t block = patch / (merge * merge), inside = patch % (merge * merge);
    const int64_t y0 = (block / (across / merge) * merge + inside / merge) * size;
    const int64_t x0 = (block % (across / merge) * merge + inside % merge) * size;
    T* target = static_cast<T*>(a.output) + (image.first_patch + patch) * 3 * a.temporal_patch_size * square;
    for (int i = threadIdx.x; i < 3 * square; i += kThreads) {
      const int c = i / square, pixel = i % square;
      // Not a.mean[c]: arguments that are indexed are copied to local memory.
      const float mean = c == 0 ? a.mean[0] : c == 1 ? a.mean[1] : a.mean[2];
      const float std = c == 0 ? a.std[0] : c == 1 ? a.std[1] : a.std[2];
      const int value = resized(image, y0 + pixel / size, x0 + pixel % size, image.channels == 1 ? 0 : c);
      const T result = from_float<T>((static_cast<float>(value) / 255.0f - mean) / std);
      T* place = target + (c * a.temporal_patch_size + image.slot) * square + pixel;
      for (int64_t copy = 0; copy < image.copies; ++copy) place[copy * square] = result;
    }
  }
}

// Blocks for `items` of work in all, the same number for each image.
int64_t blocks_for(const PackPatches& a, int64_t items) {
  int64_t each = divide_up(items, a.count);
  if (each > 4096) each = 4096;
  if (each > kMaxGrid / a.count) each = kMaxGrid / a.count;
  return a.count * (each > 1 ? each : 1);
}

template <typename T>
const char* pack(const PackPatches& a, void* stream) {
  if (a.between_bytes > 0) {
    const int64_t blocks = blocks_for(a, divide_up(a.between_bytes, kThreads));
    if (const char* error = launch(resize_between_kernel, blocks, dim3(kThreads), a, stream)) return error;
  }
  return launch(pack_patches_kernel<T>, blocks_for(a, a.patches), dim3(kThreads), a, stream);
}

}  // namespace

const char* pack_patches_cuda(const PackPatches& a, void* stream) {
  if (a.count < 1 || a.count > kMaxGrid) return "pack_patches: the number of images must be from 1 to 2^30";
  switch (a.dtype) {
    case kFloat32: return pack<float>(a, stream);
    case kBFloat16: return pack<__nv_bfloat16>(a, stream);
    case kFloat16: return pack<__half>(a, stream);
  }
  return "pack_patches: unknown dtype";
}

}  // namespace m4ov
