// The second product for few lanes, as in decoding: probabilities times values where they lie, without a panel of them
// transposed, which would be read and written for a handful of lanes. The sums are those of the tiles, in their order:
// decoding gives the bits of prefilling.
#pragma once

#include "plan.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kFewLanes = 8;  // all lanes of a sequence and key head

M4OV_INLINE bool few_lanes(const VarlenAttention& a, const Sequence& s) {
  return s.rows * (a.heads / a.kv_heads) <= kFewLanes;
}

// A step of the tiles: kPair neighbouring keys. Of the values one vector, from two rows for pairs (the second, `next`, may
// not be there); of the probabilities one lane's, everywhere.
struct FmaStep {
  using Operand = V;
  static V values(const float* row, const float*) { return load_vector(row); }
  static V probability(const float* p) { return set1(*p); }
  static V add(V sum, V p, V value) { return fma(value, p, sum); }
};
#ifdef __AVX512BF16__
struct DotStep {
  using Operand = __m512i;
  static __m512i values(const Bf16* row, const Bf16* next) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    if (!next) return even;
    const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next));
    return _mm512_or_si512(even, _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
  static __m512i probability(const Bf16* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  static V add(V sum, __m512i p, __m512i value) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<const __m512bh&>(p), reinterpret_cast<const __m512bh&>(value))};
  }
};
#endif
template <typename Tile>
struct StepOf {
  using type = FmaStep;
};
#ifdef __AVX512BF16__
template <>
struct StepOf<DotTile> {
  using type = DotStep;
};
#endif

// multiply_rows, row by row the same, while other rows come.
template <typename Tile, typename T>
static void multiply_few(float* c, const Block<typename Tile::Element>& a, const typename Tile::Element* b,
                         int64_t rows, int64_t vectors, int64_t dim, const Ahead& ahead) {
  for (int64_t i = 0; i < rows;) {
    const int64_t end = i < a.split ? smaller(a.split, rows) : rows, count = smaller(kTileRows, end - i);
    ahead.fetch(i, i + count);
    multiply_rows<Tile, T>(c + i * kBlockLanes, a.at(i), a.stride, b, count, vectors, dim);
    i += count;
  }
}

// Where sums of values begin and end: at the sums `begun` or, if null, at zero; and in `output`, of which the factors
// `rescale` say what stays of what is there (null: nothing), or, if `unfinished`, as they are. [lane][width] all.
struct Sums {
  float* output;
  int64_t width;
  const float* rescale;
  const float* begun = nullptr;
  bool unfinished = false;

  Sums at(int64_t lane, int64_t column) const {
    const int64_t there = lane * width + column;
    return {output + there, width, rescale ? rescale + lane : nullptr, begun ? begun + there : nullptr, unfinished};
  }
};

// `values`: rows of whole vectors.
template <typename Tile, int kCount, int kVectors>
static void add_some_values(const Sums& sums, const typename Tile::Element* probabilities,
                            const Block<typename Tile::Element>& values, int64_t column, int64_t keys,
                            const Ahead& ahead) {
  using Step = typename StepOf<Tile>::type;
  constexpr int64_t kPair = Tile::kPair;
  V sum[kCount][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = sums.begun ? load_vector(sums.begun + i * sums.width + j * kLanes) : set1(0.0f);
    }
  }
  for (int64_t key = 0; key < keys; key += kPair) {
    ahead.fetch(key, key + kPair);
    const auto* row = values.at(key) + column;
    const auto* next = kPair == 2 && key + 1 < keys ? values.at(key + 1) + column : nullptr;
    const auto* p = probabilities + key * kBlockLanes;
    typename Step::Operand value[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) value[j] = Step::values(row + j * kLanes, next ? next + j * kLanes : nullptr);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const auto x = Step::probability(p + i * kPair);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = Step::add(sum[i][j], x, value[j]);
    }
  }
  const bool scaled = sums.rescale && !sums.unfinished;
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* at = sums.output + i * sums.width + j * kLanes;
      store_vector(at, scaled ? fma(load_vector(at), set1(sums.rescale[i]), sum[i][j]) : sum[i][j]);
    }
  }
}

template <typename Tile, int kVectors, typename... Rest>
static void add_lanes_values(int64_t lanes, const Rest&... rest) {
  switch (lanes) {
    case 1:
      return add_some_values<Tile, 1, kVectors>(rest...);
    case 2:
      return add_some_values<Tile, 2, kVectors>(rest...);
    case 3:
      return add_some_values<Tile, 3, kVectors>(rest...);
    default:
      return add_some_values<Tile, 4, kVectors>(rest...);
  }
}

// Probabilities of some lanes and keys times the values of these, added up in the order of the keys.
template <typename Tile>
static void add_values(const Sums& sums, const typename Tile::Element* probabilities,
                       const Block<typename Tile::Element>& values, int64_t lanes, int64_t keys, const Ahead& ahead) {
  constexpr int kWide = Tile::kVectors;
  for (int64_t i = 0; i < lanes; i += 4) {
    const int64_t count = smaller(4, lanes - i);
    const auto* p = probabilities + i * Tile::kPair;
    for (int64_t j = 0; j < sums.width;) {
      const Ahead once = i == 0 && j == 0 ? ahead : Ahead{};
      const int64_t left = (sums.width - j) / kLanes;
      if (left >= kWide) {
        add_lanes_values<Tile, kWide>(count, sums.at(i, j), p, values, j, keys, once);
        j += kWide * kLanes;
      } else if (kWide > 2 && left >= 2) {
        add_lanes_values<Tile, kWide / 2>(count, sums.at(i, j), p, values, j, keys, once);
        j += kWide / 2 * kLanes;
      } else {
        add_lanes_values<Tile, 1>(count, sums.at(i, j), p, values, j, keys, once);
        j += kLanes;
      }
    }
  }
}

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
