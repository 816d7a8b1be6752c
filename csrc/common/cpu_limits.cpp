// What benchmarks are held against: a loop that only reads, and loops that only multiply and add.
#include "limits.h"
#include "parallel.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

#if defined(__AVX512F__)
using I = __m512i;
M4OV_INLINE I load_bits(const char* p) { return _mm512_loadu_si512(p); }
M4OV_INLINE I exclusive_or(I a, I b) { return _mm512_xor_si512(a, b); }
M4OV_INLINE I bytes_of(char x) { return _mm512_set1_epi8(x); }
M4OV_INLINE I words_of(short x) { return _mm512_set1_epi16(x); }
M4OV_INLINE I sum(I a, I b) { return _mm512_add_epi32(a, b); }
M4OV_INLINE I dot_words(I a, I b) { return _mm512_madd_epi16(a, b); }
M4OV_INLINE I dot_bytes(I a, I b) { return _mm512_maddubs_epi16(a, b); }
#elif defined(__AVX2__)
using I = __m256i;
M4OV_INLINE I load_bits(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
M4OV_INLINE I exclusive_or(I a, I b) { return _mm256_xor_si256(a, b); }
M4OV_INLINE I bytes_of(char x) { return _mm256_set1_epi8(x); }
M4OV_INLINE I words_of(short x) { return _mm256_set1_epi16(x); }
M4OV_INLINE I sum(I a, I b) { return _mm256_add_epi32(a, b); }
M4OV_INLINE I dot_words(I a, I b) { return _mm256_madd_epi16(a, b); }
M4OV_INLINE I dot_bytes(I a, I b) { return _mm256_maddubs_epi16(a, b); }
#else
using I = __m128i;
M4OV_INLINE I load_bits(const char* p) { return _mm_loadu_si128(reinterpret_cast<const I*>(p)); }
M4OV_INLINE I exclusive_or(I a, I b) { return _mm_xor_si128(a, b); }
M4OV_INLINE I words_of(short x) { return _mm_set1_epi16(x); }
M4OV_INLINE I sum(I a, I b) { return _mm_add_epi32(a, b); }
M4OV_INLINE I dot_words(I a, I b) { return _mm_madd_epi16(a, b); }
#endif

constexpr int64_t kWidth = sizeof(I), kLine = 64;

// The optimiser may assume nothing of x: an operation on it is made in every step.
template <typename T>
M4OV_INLINE void hide(T& x) {
  asm volatile("" : "+x"(x));
}

// Several streams at a time, far apart: with one, the hardware's prefetchers stop at the end of every page. (On Zen 4, one
// core, GB/s: one stream 18, with software prefetches 18, two 22.6, four 25, eight 24; in huge pages 29 and 31.)
uint64_t read_range(const char* p, int64_t bytes) {
  constexpr int kStreams = 4;
  constexpr int64_t kEach = int64_t{1} << 18;
  I sums[kStreams] = {};
  int64_t i = 0;
  for (; i + kStreams * kEach <= bytes; i += kStreams * kEach) {
    for (int64_t k = 0; k < kEach; k += kLine) {
      for (int j = 0; j < kStreams; ++j) {
        for (int64_t v = 0; v < kLine; v += kWidth) sums[j] = exclusive_or(sums[j], load_bits(p + i + j * kEach + k + v));
      }
    }
  }
  for (; i + kLine <= bytes; i += kLine) {
    for (int64_t v = 0; v < kLine; v += kWidth) sums[0] = exclusive_or(sums[0], load_bits(p + i + v));
  }
  uint64_t words[kStreams * kWidth / 8], all = 0;
  memcpy(words, sums, sizeof words);
  for (const uint64_t word : words) all ^= word;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    memcpy(&word, p + i, 8);
    all ^= word;
  }
  uint64_t last = 0;
  memcpy(&last, p + i, static_cast<size_t>(bytes - i));
  return all ^ last;
}

// More sums than an instruction's latency times how many of them begin in a cycle.
template <int kSums, typename Sum, typename Step>
M4OV_INLINE void repeat(int64_t steps, Sum start, const Step& step) {
  Sum sums[kSums];
  for (int j = 0; j < kSums; ++j) sums[j] = start;
  for (int64_t i = 0; i < steps; ++i) {
    for (int j = 0; j < kSums; ++j) sums[j] = step(sums[j]);
  }
  for (int j = 0; j < kSums; ++j) hide(sums[j]);
}

// Returns the operations of one thread.
int64_t multiply_bytes(int64_t steps) {
#if defined(__AVX512VNNI__)
  constexpr int kSums = 12;
  I a = bytes_of(3), b = bytes_of(-5);
  hide(a), hide(b);
  repeat<kSums>(steps, I{}, [&](I x) { return _mm512_dpbusd_epi32(x, a, b); });
  return steps * kSums * kWidth * 2;
#elif defined(__AVX2__)
  constexpr int kSums = 8;
  I a = bytes_of(3), b = bytes_of(-5), ones = words_of(1);
  hide(b), hide(ones);
  repeat<kSums>(steps, I{}, [&](I x) {
    hide(a);
    return sum(x, dot_words(dot_bytes(a, b), ones));
  });
  return steps * kSums * kWidth * 2;
#else
  constexpr int kSums = 8;  // SSE2 multiplies words: the bytes are taken as widened before
  I a = words_of(3), b = words_of(-5);
  hide(b);
  repeat<kSums>(steps, I{}, [&](I x) {
    hide(a);
    return sum(x, dot_words(a, b));
  });
  return steps * kSums * kWidth;
#endif
}

int64_t multiply_bf16(int64_t steps) {
  constexpr int kSums = 12;
#if defined(__AVX512BF16__)
  const I one = _mm512_set1_epi16(0x3f80);
  __m512bh a = reinterpret_cast<const __m512bh&>(one), b = a;
  hide(a), hide(b);
  repeat<kSums>(steps, _mm512_setzero_ps(), [&](__m512 x) { return _mm512_dpbf16_ps(x, a, b); });
  return steps * kSums * kLanes * 4;
#else
  V a = set1(0.5f), b = set1(1.0f);  // widened to fp32; the sum goes to 2
  hide(a.v), hide(b.v);
  repeat<kSums>(steps, a.v, [&](auto x) { return fma(V{x}, a, b).v; });
  return steps * kSums * kLanes * 2;
#endif
}

}  // namespace

uint64_t read_bytes(const ReadBytes& a) {
  const int64_t words = a.bytes / kLine;
  uint64_t all = 0;
  parallel_ranges(words, a.bytes, a.threads, [&](int64_t begin, int64_t end) {
    const int64_t last = end == words ? a.bytes : end * kLine;
    const uint64_t found = read_range(static_cast<const char*>(a.from) + begin * kLine, last - begin * kLine);
    __atomic_fetch_xor(&all, found, __ATOMIC_RELAXED);
  });
  return words ? all : read_range(static_cast<const char*>(a.from), a.bytes);
}

int64_t dot_loop(const DotLoop& a) {
  int64_t made = 0;
  const auto work = [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t found = a.kind == kDotInt8 ? multiply_bytes(a.steps) : multiply_bf16(a.steps);
      __atomic_fetch_add(&made, found, __ATOMIC_RELAXED);
    }
  };
  parallel_ranges(a.threads, kParallelBytes, a.threads, work);
  return made;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
