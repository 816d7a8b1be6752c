// Log-probabilities of a projection on a vocabulary, and their gradients, without the logits in memory.
#include "backward.h"
#include "forward.h"

namespace m4ov {
namespace M4OV_VARIANT {
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
    bytes = backward<Backward<typename decltype(tile)::type, typename decltype(tag)::type>>(a, a);
  });
  return bytes;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
