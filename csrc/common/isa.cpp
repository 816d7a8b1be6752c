#include "isa.h"

#include <cpuid.h>

namespace m4ov {

const char* const kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};

namespace {

constexpr unsigned bit(int position) { return 1u << position; }
bool has(unsigned value, unsigned bits) { return (value & bits) == bits; }

// Which register files the operating system saves on a context switch (XCR0).
unsigned saved_state() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Isa probe() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return kBaseline;
  const unsigned osxsave = bit(27), avx = bit(28), fma = bit(12), f16c = bit(29);
  if (!has(ecx, osxsave | avx | fma | f16c)) return kBaseline;
  const unsigned state = saved_state();
  const unsigned ymm = bit(1) | bit(2), zmm = bit(5) | bit(6) | bit(7);
  if (!has(state, ymm)) return kBaseline;

  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return kBaseline;
  const unsigned subleaves = eax;
  const unsigned avx2 = bit(5), f = bit(16), dq = bit(17), bw = bit(30), vl = bit(31), vnni = bit(11);
  if (!has(ebx, avx2)) return kBaseline;
  if (!has(state, zmm) || !has(ebx, f | dq | bw | vl)) return kAvx2;
  if (!has(ecx, vnni) || subleaves < 1) return kAvx512;
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  return has(eax, bit(5)) ? kAvx512Bf16 : kAvx512;
}

}  // namespace

// Once: a virtual machine's monitor answers CPUID, in tens of microseconds.
Isa detect_isa() {
  static const Isa found = probe();
  return found;
}

}  // namespace m4ov
