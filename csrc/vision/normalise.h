// Bytes to normalised floats with NumPy's bits, and patches to memory. Included by cpu_pack_patches.cpp only.
#pragma once

#include "bytes.h"

namespace m4ov {
namespace M4OV_VARIANT {

// ((x / 255) - mean) / std, each step rounded to fp32. (NumPy makes the first in float64, x * (1 / 255), and rounds: the
// same bits, as no byte over 255 lies near the middle of two fp32 numbers.) Divisions are slow; a product with the
// reciprocal and one correction gives the same bits for nearly every mean and std, and for all those for which `fast`
// is set: it has been tried on all 256 bytes.
struct Channel {
  float mean, std, inverse;
  bool fast;
};

template <bool kFast>
M4OV_INLINE V normalise(V x, const Channel& channel) {
  if constexpr (kFast) {
    const float high = 1.0f / 255.0f, low = static_cast<float>(1.0 / 255.0 - static_cast<double>(high));
    const V shifted = fma(x, set1(high), x * set1(low)) - set1(channel.mean);
    const V quotient = shifted * set1(channel.inverse);
    return fma(fma(set1(0.0f) - quotient, set1(channel.std), shifted), set1(channel.inverse), quotient);
  } else {
    return (x / set1(255.0f) - set1(channel.mean)) / set1(channel.std);
  }
}
template <bool kFast>
M4OV_INLINE Pair normalise(Pair x, const Channel& channel) {
  return {normalise<kFast>(x.a, channel), normalise<kFast>(x.b, channel)};
}

static Channel channel_of(float mean, float std) {
  Channel channel = {mean, std, 1.0f / std, true};
  uint8_t bytes[256];
  for (int i = 0; i < 256; ++i) bytes[i] = static_cast<uint8_t>(i);
  for (int i = 0; i < 256; i += kGroup) {
    float fast[kGroup], exact[kGroup];
    store(fast, normalise<true>(widen<float>(bytes + i), channel));
    store(exact, normalise<false>(widen<float>(bytes + i), channel));
    for (int k = 0; k < kGroup; ++k) channel.fast &= fast[k] == exact[k];
  }
  return channel;
}

// `count` bytes to each of `copies` places, `distance` elements apart. Reads up to kGroup - 1 bytes more. kStream: the
// places are vector-aligned and `count` is a multiple of kGroup.
template <typename T, bool kStream, bool kFast>
static void normalise_run(T* target, int64_t distance, int64_t copies, const uint8_t* bytes, int64_t count,
                          const Channel& channel) {
  int64_t at = 0;
  for (; at + kGroup <= count; at += kGroup) {
    const Pair values = normalise<kFast>(widen<T>(bytes + at), channel);
    for (int64_t copy = 0; copy < copies; ++copy) put<kStream>(target + copy * distance + at, values);
  }
  if (at == count) return;
  const Pair values = normalise<kFast>(widen<T>(bytes + at), channel);
  for (int64_t copy = 0; copy < copies; ++copy) store_tail(target + copy * distance + at, values, count - at);
}

// Copies past the caches, but for what is not whole cache lines.
static void stream_copy(char* target, const char* source, int64_t bytes) {
  int64_t at = -reinterpret_cast<intptr_t>(target) & 63;
  if (at > bytes) at = bytes;
  memcpy(target, source, at);
  for (; at + 64 <= bytes; at += 64) {
    for (int64_t k = 0; k < 64; k += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at + k),
                       load16(reinterpret_cast<const uint8_t*>(source + at + k)));
    }
  }
  memcpy(target + at, source + at, bytes - at);
}

// One channel of a patch. `values`: room for it, vector-aligned.
template <typename T>
static void write_channel(T* target, int64_t copies, const uint8_t* bytes, int64_t count, const Channel& channel,
                          bool streamed, T* values) {
  if (streamed && count % kGroup == 0 && vector_aligned(target)) {
    return channel.fast ? normalise_run<T, true, true>(target, count, copies, bytes, count, channel)
                        : normalise_run<T, true, false>(target, count, copies, bytes, count, channel);
  }
  T* first = streamed ? values : target;
  const int64_t here = streamed ? 1 : copies;
  channel.fast ? normalise_run<T, false, true>(first, count, here, bytes, count, channel)
               : normalise_run<T, false, false>(first, count, here, bytes, count, channel);
  if (!streamed) return;
  for (int64_t copy = 0; copy < copies; ++copy) {
    stream_copy(reinterpret_cast<char*>(target + copy * count), reinterpret_cast<const char*>(values),
                count * static_cast<int64_t>(sizeof(T)));
  }
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
