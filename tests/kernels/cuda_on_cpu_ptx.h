// What csrc/common/ptx.cuh and a few intrinsics of CUDA are on the CPU, for kernels on the tensor cores; beside
// cuda_on_cpu.h. Copies into shared memory arrive as late as they may, at the wait for them, and until then their places
// hold NaN. The layout of mma_bf16 is written down once more here, element by element as the PTX ISA's section
// "Matrix Fragments for mma.m16n8k16 with floating point type" lists them, and not as csrc/common/ptx.cuh puts it.
#pragma once

#include <deque>

#include "cuda_on_cpu.h"

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}
inline int atomicAdd(int* p, int value) {
  const int before = *p;
  *p += value;
  return before;
}
inline void __threadfence() {}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
template <typename T>
T __ldcg(const T* p) {
  return __ldg(p);
}

namespace on_cpu {

struct Copy {
  void* to;
  const void* from;
  int bytes, all;
};
// Of each thread of the running block: groups of copies, the last one still open.
inline std::vector<std::deque<std::vector<Copy>>> copies;

inline std::deque<std::vector<Copy>>& my_copies() {
  if (copies.size() < fibers.size()) copies.resize(fibers.size());
  std::deque<std::vector<Copy>>& mine = copies[current];
  if (mine.empty()) mine.emplace_back();
  return mine;
}

// After a launch: whether there is a copy for which nobody waited.
inline bool copies_pending() {
  for (const auto& groups : copies) {
    for (const auto& group : groups) {
      if (!group.empty()) return true;
    }
  }
  return false;
}

inline float bf16_half(uint32_t pair, int half) {
  return __bfloat162float({static_cast<uint16_t>(half ? pair >> 16 : pair & 0xffff)});
}

// A sum as the tensor cores make it: one addition of all products, cut off at float32's last place.
inline float cut(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::isfinite(nearest) && std::abs(nearest) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};

inline void mma(void* const (&operands)[32]) {
  float A[16][16], B[16][8], C[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& mine = *static_cast<MmaLane*>(operands[lane]);
    const int group_id = lane >> 2, thread_in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group_id : group_id + 8;
      const int column = i < 4 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
      A[row][column] = bf16_half(mine.a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
      B[row][group_id] = bf16_half(mine.b[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      C[i < 2 ? group_id : group_id + 8][thread_in_group * 2 + (i & 1)] = mine.c[i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = C[row][column];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(A[row][k]) * static_cast<double>(B[k][column]);
      C[row][column] = cut(sum);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& mine = *static_cast<MmaLane*>(operands[lane]);
    for (int i = 0; i < 4; ++i) mine.c[i] = C[i < 2 ? lane >> 2 : (lane >> 2) + 8][lane % 4 * 2 + (i & 1)];
  }
}

}  // namespace on_cpu

namespace m4ov {

template <int kBytes>
void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes) {
    on_cpu::fail("a misaligned asynchronous copy");
  }
  if (bytes < 0 || bytes > kBytes) on_cpu::fail("an asynchronous copy of more bytes than it has");
  memset(shared, 0xff, kBytes);
  on_cpu::my_copies().back().push_back({shared, global, bytes, kBytes});
}

inline void copy_commit() { on_cpu::my_copies().emplace_back(); }

template <int kPending>
void copy_wait() {
  auto& groups = on_cpu::my_copies();
  while (groups.size() > kPending + 1) {
    for (const on_cpu::Copy& copy : groups.front()) {
      memset(copy.to, 0, copy.all);
      memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.pop_front();
  }
}

inline void once(int&) {}

inline uint32_t masked_or(uint32_t value, uint32_t mask, uint32_t bits) { return (value & mask) | bits; }

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    // Exact in double for numbers that are not 2^37 apart, and then rounded once more to float: enough for bf16.
    const double exact = static_cast<double>(on_cpu::bf16_half(a, half)) * on_cpu::bf16_half(b, half) +
                         static_cast<double>(on_cpu::bf16_half(c, half));
    result |= static_cast<uint32_t>(__float2bfloat16_rn(static_cast<float>(exact)).bits) << (16 * half);
  }
  return result;
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_cpu::MmaLane mine{c, a, b};
  on_cpu::with_warp(on_cpu::mma, &mine);
}

}  // namespace m4ov
