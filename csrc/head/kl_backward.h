// Backward of the divergence of two heads: as backward.h, with both's logits made again and another gradient of the
// first's.
#pragma once

#include "backward.h"
#include "kl.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

template <typename Tile, typename T>
struct KlBackward : Backward<Tile, T> {
  using Base = Backward<Tile, T>;
  using E = typename Tile::Element;
  const LinearKlBwd& kl;
  Logits<Tile, T> reference;

  struct Mine : Base::Mine {
    E* more_rows;
    float* more;
    Mine(Scratch& scratch, const KlBackward& work)
        : Base::Mine(scratch, work), more_rows(TwoHeads<Tile, T>::Mine::take_rows(scratch, work.reference)),
          more(scratch.take<float>(kTileWords * kBlockTokens)) {}
  };

  KlBackward(Scratch& scratch, const LinearKlBwd& a) : Base(scratch, a.policy), kl(a), reference(scratch, a.reference) {}

  void pack(int64_t block, const Mine& mine) const {
    Base::pack(block, mine);
    reference.pack(block, mine.more_rows);
  }

  // x of the policy becomes the gradient, y is the reference's.
  template <int kKind>
  void differentiate(float* tile, const float* more, int64_t count, int64_t block) const {
    const float* c = this->coefficients + block * kBlockTokens;
    const V far = set1(kFarBelow);
    for (int64_t j = 0; j < this->logits.vectors(block) * kLanes; j += kLanes) {
      const auto of = [&](int which) { return load_vector(c + which * this->padded + j); };
      const V shift_x = of(kPolicyShift), log_sum_x = of(kPolicyLogSum);
      const V shift_y = of(kReferenceShift), log_sum_y = of(kReferenceLogSum);
      const V scale = of(kScaleOf), offset = of(kOffset);
      for (int64_t i = 0; i < count; ++i) {
        float* at = tile + i * kBlockTokens + j;
        const V log_p = load_vector(at) - shift_x - log_sum_x;
        const V log_q = load_vector(more + i * kBlockTokens + j) - shift_y - log_sum_y;
        V g;
        if constexpr (kKind == kKlForward) {
          g = exp_full(log_p) - exp_full(log_q);
        } else if constexpr (kKind == kKlReverse) {
          const V p = exp_for<T>(log_p);
          g = p * (if_any(p, log_p - log_q) - offset);
        } else {
          g = exp_for<T>(log_p) * (from_first(halfway(max(far, log_p), max(far, log_q))) - offset);
        }
        store_vector(at, g * scale);
      }
    }
  }

  static bool general() { return false; }

  void run_tile(int64_t chunk, int64_t tile, int64_t columns, int64_t begin, int64_t end, bool, const Mine& mine) const {
    const int64_t first = tile * kTileWords, count = smaller(kTileWords, columns - first);
    const auto view = this->logits.weight.view(mine.buffer, chunk + first, count);
    const auto other = reference.weight.view(mine.more_rows, chunk + first, count);
    if (begin == 0) this->transpose_weight(view, first, count);
    for (int64_t block = begin; block < end; ++block) {
      this->logits.make(mine.tile, view, chunk + first, count, block);
      reference.make(mine.more, other, chunk + first, count, block);
      switch (kl.kind) {
        case kKlForward:
          differentiate<kKlForward>(mine.tile, mine.more, count, block);
          break;
        case kKlReverse:
          differentiate<kKlReverse>(mine.tile, mine.more, count, block);
          break;
        default:
          differentiate<kKlJsd>(mine.tile, mine.more, count, block);
      }
      this->lay_out(mine.tile, first, count, block);
    }
  }
};

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
