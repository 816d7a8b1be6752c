// Best-fit decreasing: sequences from the longest to the shortest, each into the fullest bin that has room for it. Bins
// that have the same room left form a stack; a bitmap of the rooms that occur, with bits over its words, finds the
// smallest that is large enough in a few steps whatever the capacity.
#include "../common/simd.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int kDigit = 11;  // bits that a pass of the sort looks at

// Sorts `from`, the numbers 0 to count - 1, by falling length, equal ones as they are; returns from or to.
int64_t* sorted(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* from, int64_t* to) {
  constexpr int64_t kBuckets = int64_t{1} << kDigit;
  for (int64_t i = 0; i < count; ++i) from[i] = i;
  for (int shift = 0; capacity >> shift; shift += kDigit) {
    int64_t begins[kBuckets + 1] = {0};
    const auto bucket = [&](int64_t i) { return kBuckets - 1 - (lengths[i] >> shift & (kBuckets - 1)); };
    for (int64_t i = 0; i < count; ++i) ++begins[bucket(i) + 1];
    for (int64_t b = 0; b < kBuckets; ++b) begins[b + 1] += begins[b];
    for (int64_t i = 0; i < count; ++i) to[begins[bucket(from[i])]++] = from[i];
    int64_t* const other = from;
    from = to;
    to = other;
  }
  return from;
}

// The rooms from 0 to capacity that some bin has left, and of each the stack of its bins.
class Rooms {
 public:
  Rooms(int64_t* zeros, int64_t* next, int64_t capacity) : tops_(zeros), next_(next), capacity_(capacity) {
    auto* free = reinterpret_cast<uint64_t*>(zeros + capacity + 1);
    for (int64_t bits = capacity + 1; depth_ == 0 || bits > 1; ++depth_) {
      bits = (bits + 63) / 64;
      levels_[depth_] = free;
      free += bits;
    }
  }

  void push(int64_t room, int64_t bin) {
    next_[bin] = tops_[room];
    tops_[room] = bin + 1;
    for (int level = 0; level < depth_; ++level, room /= 64) levels_[level][room / 64] |= uint64_t{1} << room % 64;
  }

  int64_t pop(int64_t room) {
    const int64_t bin = tops_[room] - 1;
    tops_[room] = next_[bin];
    if (tops_[room] == 0) {
      for (int level = 0; level < depth_; ++level, room /= 64) {
        if (levels_[level][room / 64] &= ~(uint64_t{1} << room % 64)) break;
      }
    }
    return bin;
  }

  // The smallest room that occurs and is not below `least`; -1: there is none.
  int64_t find(int64_t least) const {
    int64_t place = least;
    for (int level = 0; level < depth_; ++level) {
      if (place > capacity_ >> 6 * level) return -1;
      const uint64_t above = levels_[level][place / 64] >> place % 64;
      if (above) {
        place += __builtin_ctzll(above);
        for (; level; --level) place = place * 64 + __builtin_ctzll(levels_[level - 1][place]);
        return place;
      }
      place = place / 64 + 1;
    }
    return -1;
  }

 private:
  int64_t* tops_;  // a bin's number + 1; 0: no bin
  int64_t* next_;
  uint64_t* levels_[8];
  int64_t capacity_;
  int depth_ = 0;
};

}  // namespace

int64_t pack_sequences(const PackSequences& a) {
  int64_t* const first = a.scratch;
  int64_t* const second = a.scratch + a.count;
  int64_t* const by_length = sorted(a.lengths, a.count, a.capacity, first, second);
  int64_t* const bin_of = by_length == first ? second : first;  // of the i-th longest
  Rooms rooms(a.rooms, a.scratch + 2 * a.count, a.capacity);
  int64_t bins = 0;
  for (int64_t i = 0; i <= a.count; ++i) a.offsets[i] = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t length = a.lengths[by_length[i]], found = rooms.find(length);
    const int64_t room = found < 0 ? a.capacity : found;
    const int64_t bin = found < 0 ? bins++ : rooms.pop(found);
    rooms.push(room - length, bin);
    bin_of[i] = bin;
    ++a.offsets[bin + 1];
  }
  for (int64_t b = 0; b < bins; ++b) a.offsets[b + 1] += a.offsets[b];
  // offsets[b] is moved to the end of its bin while it is filled, and then back.
  for (int64_t i = 0; i < a.count; ++i) a.order[a.offsets[bin_of[i]]++] = by_length[i];
  for (int64_t b = bins; b > 0; --b) a.offsets[b] = a.offsets[b - 1];
  a.offsets[0] = 0;
  return bins;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
