// Instruction sets for which kernels are compiled, and which of them this processor and its kernel support.
#pragma once

namespace m4ov {

// In ascending order: each supports everything that those before it support.
enum Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kIsaCount };

extern const char* const kIsaNames[kIsaCount];

// The highest instruction set that both the processor and the operating system support (from CPUID and XGETBV).
Isa detect_isa();

}  // namespace m4ov
