// Log-probabilities of a projection on a vocabulary, and their gradients, without the logits in memory.
#include "backward.h"
#include "forward.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// body(tile, element type): bf16 products where the processor has them.
template <typename Body>
M4OV_INLINE void with_tile(int dtype, const Body& body) {
  with_dtype(dtype, [&](auto tag) {
#ifdef __AVX512BF16__
    if constexpr (kSame<typename decltype(tag)::type, Bf16>) return body(Tag<DotTile>{}, tag);
#endif
    body(Tag<FmaTile>{}, tag);
  });
}

}  // namespace

int64_t linear_logprob_fwd(const LinearLogprobFwd& a) {
  int64_t bytes = 0;
  with_tile(a.shared.dtype, [&](auto tile, auto tag) {
    bytes = forward<typename decltype(tile)::type, typename decltype(tag)::type>(a);
  });
  return bytes;
}

int64_t linear_logprob_bwd(const LinearLogprobBwd& a) {
  int64_t bytes = 0;
  with_tile(a.shared.dtype, [&](auto tile, auto tag) {
    bytes = backward<typename decltype(tile)::type, typename decltype(tag)::type>(a);
  });
  return bytes;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
