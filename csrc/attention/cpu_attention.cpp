// Attention inside the sequences of a packed batch: forward and backward.
#include "backward.h"
#include "decode.h"
#include "forward.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

// body(tile, element type): bf16 products where the processor has them, for which pairs of elements must come out even.
template <typename Body>
M4OV_INLINE void with_tile(int dtype, int64_t dim, const Body& body) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
#ifdef __AVX512BF16__
    if constexpr (kSame<T, Bf16>) {
      if (dim % 2 == 0) return body(Tag<DotTile>{}, tag);
    }
#endif
    body(Tag<FmaTile>{}, tag);
  });
}

}  // namespace

int64_t varlen_attention_fwd(const VarlenAttentionFwd& a) {
  int64_t bytes = 0;
  with_tile(a.shared.dtype, a.shared.dim, [&](auto tile, auto tag) {
    bytes = forward<typename decltype(tile)::type, typename decltype(tag)::type>(a);
  });
  return bytes;
}

int64_t decode_attention(const DecodeAttention& a) {
  int64_t bytes = 0;
  with_tile(a.dtype, a.dim, [&](auto tile, auto tag) {
    bytes = decode<typename decltype(tile)::type, typename decltype(tag)::type>(a);
  });
  return bytes;
}

int64_t varlen_attention_bwd(const VarlenAttentionBwd& a) {
  int64_t bytes = 0;
  with_tile(a.shared.dtype, a.shared.dim, [&](auto tile, auto tag) {
    bytes = backward<typename decltype(tile)::type, typename decltype(tag)::type>(a);
  });
  return bytes;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
