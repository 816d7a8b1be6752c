// int4_linear for few rows of the input (W4A16) on NVIDIA GPUs, from sm_80 on: as fast as the codes can be read.
//
// A tile is 128 features of the output by 8 or 16 rows of the input; a chunk is 128 features of the input. The chunks of
// all features of the output in a row are the work, and each block takes an equal run of them (stream-K), so that thin
// matrices fill the GPU as well. Who does not have all chunks of a tile writes fp32 sums to scratch; who of them comes
// last adds these up, in the order of the chunks, and finishes the tile. More than 16 rows are as many rounds of a block
// over the same run, the later ones mostly from the L2. So runs are the same for any number of rows, and on one kind of
// GPU a row's bits do not depend on its company.
//
// Codes stream through kStages buffers of shared memory. Per chunk and block that is 8 KiB of codes and 2 or 4 KiB of the
// input, which comes from the L2. Limit: DRAM. An H200's multiprocessor gets 21 bytes of codes a clock (4.8 TB/s, 132 of
// them, 1.7 GHz), and 700 ns of latency ask for 25 KiB on their way to it; 3 blocks have 48 to 72.
//
// On the tensor cores the weights are the operand with 16 rows, so that 8 rows of the input are no waste. The 8 codes of
// a word are 4 pairs (i, i + 4) of nibbles, which are 4 registers of that operand: `(word >> 4 i) & 0x000f000f`, in the
// mantissa of the bf16 number 128, is the pair 128 + q (one LOP3 beside the shift), and one fused multiply-add makes
// (q − z) / 2048 of it, exactly. Which k a register stands for is free, as long as the input's operand agrees. The sum
// of a group is scaled in fp32, by 2048 s. The division keeps it finite for any finite input, because 128 · 15 < 2048;
// it loses no bit, because a bf16 is a multiple of 2^-133, and a float of 2^-149. Where 2048 s might be no float, the
// result is beyond floats too unless the sum is small, and nothing is divided.
#include "../common/cuda.cuh"
#include "../common/ptx.cuh"
#include "../common/types.h"
#include "int4_linear.cuh"

namespace m4ov {
namespace {

constexpr int kThreads = 128;                   // four warps, of 32 features each
constexpr int kFeatures = 128, kChunk = 128;    // of a tile: of the output; of a chunk: of the input
constexpr int kWords = kChunk / 8;              // of codes, of a feature in a chunk
constexpr int kBlocksPerMultiprocessor = 3;     // what shared memory lets an A100 hold; their pipelines hide the latency
constexpr int kLeastChunks = 2;                 // of a block: with fewer it would wait for its first one only
constexpr int kStaticShared = 48 << 10;

constexpr uint32_t kNibbles = 0x000f000f;
constexpr uint32_t kMagic = 0x43004300;         // 128, twice, in bf16: its last mantissa bit is worth 1
constexpr uint32_t kMinus = 0xc300;             // −128; −(128 + z) has z in its mantissa
constexpr uint32_t kMinusDivided = 0xbd80;      // −128 / 2048
constexpr uint32_t kExponents = 0x7f807f80, kSevenExponents = 0x03800380;  // of bf16, which 128 has more than 1
constexpr float kDivisor = 2048.0f, kLargeScale = 0x1p100f;

template <int kGroup, int kTiles>
struct alignas(16) Stage {
  uint32_t codes[kFeatures * kWords];
  uint32_t input[8 * kTiles * kChunk / 2];
  float scales[kChunk / kGroup][kFeatures];    // 2048 s, or s
  uint16_t minus[kChunk / kGroup][kFeatures];  // −(128 + z) / 2048 in bf16, or −(128 + z)
};

template <int kGroup, int kTiles>
constexpr int kStages = (kStaticShared - 16) / sizeof(Stage<kGroup, kTiles>) < 4 ? 3 : 4;

// Both matrices lie in shared memory in pieces of 16 bytes, a row's after each other but for these exclusive ors, so that
// lanes that read together meet 32 different banks. A row of codes is 4 pieces, of the input 16.
__device__ __forceinline__ int code_piece(int row, int piece) {
  return row * (kWords / 4) + (piece ^ ((row >> 1 & 1) << 1 | (row >> 2 & 1)));
}

// A lane reads kGroup / 32 words of codes at once, and so the places at which the input is read together differ.
template <int kGroup>
__device__ __forceinline__ int input_piece(int row, int piece) {
  const int odd = row & 1;
  return row * kWords + (piece ^ (kGroup == 128 ? piece >> 3 ^ odd << 1 : kGroup == 64 ? odd : odd << 2));
}

// The run of a block, of chunks counted through all features of the output.
struct Run {
  int64_t first;  // chunk
  int count, chunks, feature, chunk;  // chunks of the run, and of a feature; where it begins

  __device__ __forceinline__ explicit Run(const Int4Linear& a) {
    chunks = static_cast<int>((a.width + kChunk - 1) / kChunk);
    first = begin_of(blockIdx.x, total(a), a.blocks);
    count = static_cast<int>(begin_of(blockIdx.x + int64_t{1}, total(a), a.blocks) - first);
    feature = static_cast<int>(first / chunks);
    chunk = static_cast<int>(first % chunks);
  }
  __device__ __forceinline__ int64_t total(const Int4Linear& a) const {
    return (a.columns + kFeatures - 1) / kFeatures * chunks;
  }
  static __device__ __forceinline__ int64_t begin_of(int64_t block, int64_t total, int64_t blocks) {
    return block * total / blocks;
  }
};

// Where a block is in its run, and in its rounds over it.
struct Place {
  int done, feature, chunk, round;  // `feature`: of tiles

  __device__ __forceinline__ explicit Place(const Run& run) : done(0), feature(run.feature), chunk(run.chunk), round(0) {}
  __device__ __forceinline__ void advance(const Run& run) {
    if (++done == run.count) {
      *this = Place(run, round + 1);
    } else if (++chunk == run.chunks) {
      chunk = 0, ++feature;
    }
  }

 private:
  __device__ __forceinline__ Place(const Run& run, int round) : Place(run) { this->round = round; }
};

__device__ __forceinline__ uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

// One multiply-add of 32 bits to 64.
__device__ __forceinline__ const char* along(const void* p, uint32_t count, uint32_t bytes) {
  return static_cast<const char*>(p) + static_cast<uint64_t>(count) * bytes;
}

// Starts the copies of one chunk. Of codes past the end of a row or of the matrix others are read: their input is 0, or
// their result is not written. Of rows past the end of the input nothing is read, nor is their result written.
template <int kGroup, int kTiles>
__device__ __forceinline__ void fetch(const Int4Linear& a, Stage<kGroup, kTiles>& stage, const Place& at, int wide) {
  const uint32_t row_bytes = static_cast<uint32_t>(a.width + 7) / 8 * 4, last = static_cast<uint32_t>(a.columns - 1);
  const uint32_t row = threadIdx.x / 4, piece = threadIdx.x % 4, byte = at.chunk * (kWords * 4) + piece * 16;
  const uint32_t feature = at.feature * kFeatures + row;
  uint32_t* const to = stage.codes + 4 * code_piece(row, piece);  // 32 rows on, the order of the pieces is the same
  if (wide) {
    const char* const from = static_cast<const char*>(a.codes) + least(byte, row_bytes - 16);
#pragma unroll
    for (int i = 0; i < kFeatures; i += kThreads / 4) {
      copy_async<16>(to + kWords * i, along(from, least(feature + i, last), row_bytes), 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kFeatures; i += kThreads / 4) {
      const char* const from = along(a.codes, least(feature + i, last), row_bytes);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        copy_async<4>(to + kWords * i + word, from + least(byte + 4 * word, row_bytes - 4), 4);
      }
    }
  }
  const uint32_t place = threadIdx.x / kWords, first = at.round * (8 * kTiles) + place;
  const uint32_t k = at.chunk * kChunk + threadIdx.x % kWords * 8, width = static_cast<uint32_t>(a.width);
  const bool ends = static_cast<uint32_t>(at.chunk + 1) * kChunk > width;
  const char* const from = static_cast<const char*>(a.input) + k * 2;
#pragma unroll
  for (int i = 0; i < 8 * kTiles; i += kThreads / kWords) {
    uint32_t* const to = stage.input + 4 * input_piece<kGroup>(place + i, threadIdx.x % kWords);
    const char* const row_from = along(from, first + i, static_cast<uint32_t>(a.input_row) * 2);
    if (first + i >= static_cast<uint32_t>(a.rows)) continue;
    if (ends) {
      copy_async<16>(to, row_from, k < width ? least(2 * (width - k), 16) : 0);
    } else {
      copy_async<16>(to, row_from, 16);
    }
  }
}

__device__ __forceinline__ float half_of(uint32_t bits) {
  __half value;
  memcpy(&value, &bits, sizeof(value));
  return to_float(value);
}

// The scales and zero points of one feature of the tile (a thread's) in the groups of a chunk, on their way to shared
// memory. Of features and groups past the end they are the last one's: those results are not written, and that input is
// 0.
template <int kGroups>
struct Factors {
  uint32_t scales[kGroups];  // bits as they are in memory
  uint8_t zeros[kGroups];

  __device__ __forceinline__ void load(const Int4Linear& a, const Place& at) {
    const uint32_t groups = static_cast<uint32_t>(a.groups), last = static_cast<uint32_t>(a.columns - 1);
    const uint64_t row = static_cast<uint64_t>(least(at.feature * kFeatures + threadIdx.x, last)) * groups;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint64_t place = row + least(at.chunk * kGroups + i, groups - 1);
      scales[i] = a.scale_dtype == kFloat32 ? __ldg(static_cast<const uint32_t*>(a.scales) + place)
                                            : __ldg(static_cast<const uint16_t*>(a.scales) + place);
      zeros[i] = a.zeros == nullptr ? 8 : __ldg(a.zeros + place) & 15;
    }
  }

  template <typename AStage>
  __device__ __forceinline__ void store(const Int4Linear& a, AStage& stage) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float scale = a.scale_dtype == kFloat16 ? half_of(scales[i])
                                                    : __uint_as_float(scales[i] << (a.scale_dtype == kFloat32 ? 0 : 16));
      const bool large = fabsf(scale) >= kLargeScale;
      stage.scales[i][threadIdx.x] = large ? scale : scale * kDivisor;
      stage.minus[i][threadIdx.x] = static_cast<uint16_t>((large ? kMinus : kMinusDivided) | zeros[i]);
    }
  }
};

template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t values[kCount];
};

// (q − z) f of 8 codes: pairs (0, 4), (1, 5), (2, 6), (3, 7), in bf16, exact. `minus`: −(128 + z) f, `factor`: f, twice.
__device__ __forceinline__ void dequantize(uint32_t word, uint32_t factor, uint32_t minus, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = fma_bf16x2(masked_or(word >> (4 * i), kNibbles, kMagic), factor, minus);
}

// Where a lane reads codes and input. A quad of lanes has all words of a group of a row, kTogether each. What changes from
// group to group, and from word to word, is an exclusive or.
template <int kGroup>
struct Lane {
  static constexpr int kTogether = kGroup / 32;
  int row, codes, input;  // of its first codes; in 4 bytes

  __device__ __forceinline__ Lane() {
    const int lane = threadIdx.x % kWarp, g = lane / 4, word = kTogether * (lane % 4);
    row = threadIdx.x / kWarp * 32 + g;
    codes = 4 * code_piece(row, word / 4) + word % 4;
    input = 4 * input_piece<kGroup>(g, word);
    once(row), once(codes), once(input);
  }
  __device__ __forceinline__ int codes_of(int group) const { return codes ^ 4 * kTogether * group; }
  __device__ __forceinline__ int input_of(int group, int word) const {
    return input ^ 4 * (4 * kTogether * group + word);
  }
};

// sums += the products of one chunk, for this warp's 32 features as two operands of 16 rows; in the layout of mma_bf16's
// C. `at`: where this lane reads.
template <int kGroup, int kTiles>
__device__ __forceinline__ void multiply(const Stage<kGroup, kTiles>& stage, const Lane<kGroup>& at,
                                         float (&sums)[2][kTiles][4]) {
  constexpr int kTogether = Lane<kGroup>::kTogether;
#pragma unroll
  for (int group = 0; group < kChunk / kGroup; ++group) {
    Words<kTogether> codes[2][2];
    uint32_t factor[2][2], minus[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* p = stage.codes + at.codes_of(group) + kWords * (16 * m + 8 * half);
        codes[m][half] = *reinterpret_cast<const Words<kTogether>*>(p);
        minus[m][half] = stage.minus[group][at.row + 16 * m + 8 * half] * 0x00010001u;
        factor[m][half] = (minus[m][half] & kExponents) - kSevenExponents;
      }
    }
    float products[2][kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      uint32_t input[kTiles][2][2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t* p = stage.input + at.input_of(group, i) + kChunk / 2 * 8 * n;
        const Words<4> x = *reinterpret_cast<const Words<4>*>(p);  // pairs (0, 1), (2, 3), (4, 5), (6, 7)
        input[n][0][0] = __byte_perm(x.values[0], x.values[2], 0x5410);
        input[n][0][1] = __byte_perm(x.values[0], x.values[2], 0x7632);
        input[n][1][0] = __byte_perm(x.values[1], x.values[3], 0x5410);
        input[n][1][1] = __byte_perm(x.values[1], x.values[3], 0x7632);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t upper[4], lower[4];
        dequantize(codes[m][0].values[i], factor[m][0], minus[m][0], upper);
        dequantize(codes[m][1].values[i], factor[m][1], minus[m][1], lower);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t weight[4] = {upper[2 * step], lower[2 * step], upper[2 * step + 1], lower[2 * step + 1]};
#pragma unroll
          for (int n = 0; n < kTiles; ++n) mma_bf16(products[m][n], weight, input[n][step]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = stage.scales[group][at.row + 16 * m + 8 * (i / 2)];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) sums[m][n][i] = fmaf(scale, products[m][n][i], sums[m][n][i]);
      }
    }
  }
}

template <typename T, int kTiles>
__device__ __forceinline__ void write(const Int4Linear& a, const Place& at, const float (&sums)[2][kTiles][4]) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(at.feature) * kFeatures + threadIdx.x / kWarp * 32 + lane / 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t feature = first + 16 * m + 8 * half;
      if (feature >= a.columns) continue;
      const float bias = a.bias == nullptr ? 0.0f : to_float(__ldg(static_cast<const T*>(a.bias) + feature));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t row = 8 * (at.round * kTiles + n) + lane % 4 * 2 + i;
          if (row >= a.rows) continue;
          float value = sums[m][n][2 * half + i];
          if (a.bias != nullptr) value += bias;
          if (a.residual != nullptr) {
            value += to_float(__ldg(static_cast<const T*>(a.residual) + row * a.residual_row + feature));
          }
          static_cast<T*>(a.output)[row * a.columns + feature] = from_float<T>(value);
        }
      }
    }
  }
}

// Sums of a part of the tile's chunks become the whole tile's, in the block that comes last; the others get `false`.
// `begin` and `end`: of the tile's chunks.
template <int kTiles>
__device__ __forceinline__ bool add_up(const Int4Linear& a, const Run& run, const Place& at, int64_t begin, int64_t end,
                                       float (&sums)[2][kTiles][4]) {
  __shared__ int came_last;
  // Of float4. A block writes two at most in a round: of its first and last tile.
  constexpr int64_t kSlot = 2 * kTiles * kThreads;
  float4* const partials = reinterpret_cast<float4*>(a.partials) + at.round * 2 * a.blocks * kSlot + threadIdx.x;
  float4* mine = partials + (2 * static_cast<int64_t>(blockIdx.x) + (run.first < begin)) * kSlot;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float(&s)[4] = sums[m][n];
      mine[(m * kTiles + n) * kThreads] = make_float4(s[0], s[1], s[2], s[3]);
      sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.0f;
    }
  }
  // The block of a chunk is the last one that begins at or before it.
  const int64_t total = run.total(a), first = ((begin + 1) * a.blocks - 1) / total, last = (end * a.blocks - 1) / total;
  int* const arrivals = a.arrivals + at.round * (total / run.chunks) + at.feature;
  __threadfence();  // the sums before the arrival
  __syncthreads();
  if (threadIdx.x == 0) came_last = atomicAdd(arrivals, 1) == static_cast<int>(last - first);
  __syncthreads();
  if (!came_last) return false;
  __threadfence();  // the others' arrivals before their sums
  for (int64_t block = first; block <= last; ++block) {
    const float4* theirs = partials + (2 * block + (Run::begin_of(block, total, a.blocks) < begin)) * kSlot;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float4 added = __ldcg(theirs + (m * kTiles + n) * kThreads);
        sums[m][n][0] += added.x;
        sums[m][n][1] += added.y;
        sums[m][n][2] += added.z;
        sums[m][n][3] += added.w;
      }
    }
  }
  return true;
}

template <int kGroup, int kTiles>
__global__ void __launch_bounds__(kThreads, 4) int4_linear_kernel(const Int4Linear a) {
  constexpr int kDepth = kStages<kGroup, kTiles>;
  __shared__ Stage<kGroup, kTiles> stages[kDepth];
  const Run run(a);
  const int steps = run.count * static_cast<int>((a.rows + 8 * kTiles - 1) / (8 * kTiles));
  int wide = a.width % 32 == 0 && reinterpret_cast<uintptr_t>(a.codes) % 16 == 0;
  once(wide);

  const Lane<kGroup> lane;
  Place here(run), ahead(run);
  Factors<kChunk / kGroup> factors{};
  for (int i = 0; i < kDepth - 1; ++i) {
    if (i < steps) {
      fetch(a, stages[i], ahead, wide);
      factors.load(a, ahead);
      factors.store(a, stages[i]);
      ahead.advance(run);
    }
    copy_commit();
  }

  int current = 0;
  float sums[2][kTiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<kDepth - 2>();
    __syncthreads();  // this chunk is there for all, and all are done with the one before, whose buffer is now filled
    Stage<kGroup, kTiles>& filled = stages[current == 0 ? kDepth - 1 : current - 1];
    const bool more = step + kDepth - 1 < steps;
    if (more) {
      fetch(a, filled, ahead, wide);
      factors.load(a, ahead);
      ahead.advance(run);
    }
    copy_commit();
    multiply(stages[current], lane, sums);
    if (more) factors.store(a, filled);  // only now, so that nothing waits for their loads
    current = current == kDepth - 1 ? 0 : current + 1;
    if (here.chunk == run.chunks - 1 || here.done == run.count - 1) {
      const int64_t begin = static_cast<int64_t>(here.feature) * run.chunks, end = begin + run.chunks;
      const bool whole = run.first <= begin && end <= run.first + run.count;
      if (whole || add_up<kTiles>(a, run, here, begin, end, sums)) {
        if (a.dtype == kBFloat16) {
          write<__nv_bfloat16, kTiles>(a, here, sums);
        } else if (a.dtype == kFloat16) {
          write<__half, kTiles>(a, here, sums);
        } else {
          write<float, kTiles>(a, here, sums);
        }
      }
#pragma unroll
      for (int i = 0; i < 8 * kTiles; ++i) sums[i / (4 * kTiles)][i / 4 % kTiles][i % 4] = 0.0f;
    }
    here.advance(run);
  }
}

int tiles_of(int64_t rows) { return rows > 8 ? 2 : 1; }

template <int kGroup>
const char* launch_group(const Int4Linear& a, void* stream) {
  const auto kernel = tiles_of(a.rows) == 1 ? int4_linear_kernel<kGroup, 1> : int4_linear_kernel<kGroup, 2>;
  return launch(kernel, a.blocks, dim3(kThreads), a, stream);
}

int64_t chunks_of(int64_t columns, int64_t width) { return divide_up(columns, kFeatures) * divide_up(width, kChunk); }

}  // namespace

Int4LinearPlan int4_linear_cuda_plan(int64_t rows, int64_t columns, int64_t width, int64_t multiprocessors) {
  const int64_t most = chunks_of(columns, width) / kLeastChunks, wanted = multiprocessors * kBlocksPerMultiprocessor;
  const int64_t blocks = wanted < most ? wanted : most > 1 ? most : 1, rounds = divide_up(rows, 8 * tiles_of(rows));
  return {blocks, rounds * blocks * 2 * kFeatures * 8 * tiles_of(rows), rounds * divide_up(columns, kFeatures)};
}

const char* int4_linear_cuda(const Int4Linear& a, void* stream) {
  if (a.rows == 0) return nullptr;
  constexpr int64_t kMost = int64_t{1} << 30;  // so that 32 bits count elements of a row, and rows
  if (a.columns < 1 || a.width < 1 || a.columns > kMost || a.width > kMost || a.rows > kMost || a.input_row > kMost) {
    return "int4_linear: sizes out of range";
  }
  const int64_t chunks = chunks_of(a.columns, a.width);
  if (a.blocks < 1 || a.blocks > chunks || a.blocks > kMaxGrid) return "int4_linear: blocks not as planned";
  if (chunks / a.blocks > INT32_MAX / (a.rows + 1)) return "int4_linear: too large";
  if (!aligned(a.input) || a.input_row % 8 != 0) return "int4_linear: rows of the input are not 16-byte aligned";
  if (reinterpret_cast<uintptr_t>(a.codes) % 4 != 0) return "int4_linear: codes are not 4-byte aligned";
  if (!aligned(a.partials)) return "int4_linear: partials are not 16-byte aligned";
  if (a.scale_dtype < kFloat32 || a.scale_dtype > kFloat16) return "int4_linear: unknown dtype of the scales";
  if (a.dtype < kFloat32 || a.dtype > kFloat16) return "int4_linear: unknown dtype";
  const int64_t group = a.groups == 1 ? 128 : a.group;
  if (group != 32 && group != 64 && group != 128) return "int4_linear: groups of 32, 64, 128, or one for the whole row";
  if (a.groups < 1 || (a.groups > 1 && a.groups != divide_up(a.width, group))) return "int4_linear: groups do not fit";
  return group == 32   ? launch_group<32>(a, stream)
         : group == 64 ? launch_group<64>(a, stream)
                       : launch_group<128>(a, stream);
}

}  // namespace m4ov
