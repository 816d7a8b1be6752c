// Which token comes next, of rows of logits that lie in columns, as the head's kernel keeps them.
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {  // nothing that the linker could share between variants

constexpr int64_t kBlock = 16;  // rows that are read together

// Sums run over the vocabulary in order, in fp64: a row's token depends on its own logits and draw alone.
static void choose(const ChooseTokens& a, int64_t first, float* weights) {
  const int64_t rows = smaller(kBlock, a.rows - first);
  int64_t column[kBlock], chosen[kBlock] = {};
  float largest[kBlock];
  double sum[kBlock] = {}, wanted[kBlock];
  bool together = true;
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = first + smaller(i, rows - 1);  // the last once more
    column[i] = a.column[row], largest[i] = a.largest[row];
    together = together && column[i] == column[0] + i;
  }
  for (int64_t word = 0; word < a.vocab; ++word) {
    const float* from = a.logits + word * a.stride;
    float x[kBlock];
    if (together) {
      memcpy(x, from + column[0], sizeof x);
    } else {
      for (int64_t i = 0; i < kBlock; ++i) x[i] = from[column[i]];
    }
    float* to = weights + word * kBlock;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      store_vector(to + i, exp_full(load_vector(x + i) - load_vector(largest + i)));
    }
    for (int64_t i = 0; i < kBlock; ++i) sum[i] += static_cast<double>(to[i]);
  }
  for (int64_t i = 0; i < kBlock; ++i) {
    const double below = __builtin_nextafter(sum[i], 0.0), at = a.draws[first + smaller(i, rows - 1)] * sum[i];
    wanted[i] = at < below ? at : below;
    sum[i] = 0.0;
  }
  for (int64_t word = 0; word < a.vocab; ++word) {
    const float* from = weights + word * kBlock;
    for (int64_t i = 0; i < kBlock; ++i) {
      sum[i] += static_cast<double>(from[i]);
      chosen[i] += sum[i] <= wanted[i];
    }
  }
  // Of logits that are not finite the comparisons mean nothing; what comes of them is a token still.
  for (int64_t i = 0; i < rows; ++i) a.tokens[first + i] = smaller(chosen[i], a.vocab - 1);
}

}  // namespace

int64_t choose_tokens(const ChooseTokens& a) {
  const int64_t each = rounded_up(a.vocab * kBlock * static_cast<int64_t>(sizeof(float)), 64);
  const int64_t blocks = blocks_of(a.rows, kBlock);
  const int team = blocks < a.threads ? static_cast<int>(larger(blocks, 1)) : a.threads;
  if (!a.scratch) return each * team;
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    choose(a, block * kBlock, reinterpret_cast<float*>(a.scratch + each * omp_get_thread_num()));
  }
  return 0;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
