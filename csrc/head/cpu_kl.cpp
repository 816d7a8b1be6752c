// Divergences between the distributions of two heads over one vocabulary, and their gradients, without logits in memory.
#include "kl_backward.h"
#include "kl_forward.h"

namespace m4ov {
namespace M4OV_VARIANT {

int64_t linear_kl_fwd(const LinearKlFwd& a) {
  int64_t bytes = 0;
  with_tile(a.first.dtype, [&](auto tile, auto tag) {
    using Tile = typename decltype(tile)::type;
    using T = typename decltype(tag)::type;
    bytes = a.normalizer ? kl_forward<KlForward<Tile, T, true>>(a) : kl_forward<KlForward<Tile, T, false>>(a);
  });
  return bytes;
}

int64_t linear_kl_bwd(const LinearKlBwd& a) {
  int64_t bytes = 0;
  with_tile(a.policy.shared.dtype, [&](auto tile, auto tag) {
    bytes = backward<KlBackward<typename decltype(tile)::type, typename decltype(tag)::type>>(a, a.policy);
  });
  return bytes;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
