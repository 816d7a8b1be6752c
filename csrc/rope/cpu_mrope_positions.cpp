// Positions of multimodal rotary embedding, in two passes over chunks of tokens. The first counts image and video
// tokens. What comes before a token follows from these counts alone (how many tokens of a kind came before says which
// images are complete), so that in the second every chunk begins anywhere, and the threads need not wait for each other.
#include "../common/parallel.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int64_t kBlock = 64;  // tokens that are looked at together for the end of a text

// The images or the videos. A unit, which nothing may interrupt, is an item or, if `by_frame`, one of its frames.
struct Items {
  const int64_t* grid;
  const float* intervals;  // or null: frames are 1 apart
  int64_t* starts;         // [count + 1], tokens of the items before
  int64_t* steps;          // [count + 1], how far the items before move what follows
  int64_t count, merge, kind;
  bool by_frame;

  int64_t frames(int64_t item) const { return by_frame ? 1 : grid[3 * item]; }  // of a unit
  int64_t rows(int64_t item) const { return grid[3 * item + 1] / merge; }
  int64_t columns(int64_t item) const { return grid[3 * item + 2] / merge; }
  int64_t step(int64_t item) const { return rows(item) > columns(item) ? rows(item) : columns(item); }
  int64_t unit(int64_t item) const { return frames(item) * rows(item) * columns(item); }  // tokens
  int64_t time(int64_t item, int64_t frame) const {
    // In float32, towards 0, as Hugging Face has it.
    return intervals ? static_cast<int64_t>(static_cast<float>(frame) * intervals[item]) : frame;
  }
};

// Where the next token of a kind stands: in which item, behind how many of its tokens.
struct Cursor {
  int64_t item, offset;
};

// The largest place in [0, count] with values[place] <= value; values[0] <= value.
int64_t last_not_above(const int64_t* values, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (values[middle] <= value) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

constexpr int64_t kLargest = int64_t{1} << 20;  // as in values.py
constexpr float kFarthest = 9007199254740992.0f;

// False: a grid that is none, or that has more tokens than there are.
bool tabulate(const Items& items, int64_t tokens) {
  items.starts[0] = items.steps[0] = 0;
  for (int64_t i = 0; i < items.count; ++i) {
    const int64_t t = items.grid[3 * i], h = items.grid[3 * i + 1], w = items.grid[3 * i + 2];
    if (t < 1 || h < 1 || w < 1 || t > kLargest || h > kLargest || w > kLargest) return false;
    if (h % items.merge || w % items.merge) return false;
    if (items.intervals && !(items.intervals[i] >= 0 && items.intervals[i] * static_cast<float>(t) < kFarthest)) {
      return false;
    }
    items.starts[i + 1] = items.starts[i] + t * items.rows(i) * items.columns(i);
    items.steps[i + 1] = items.steps[i] + items.step(i) * (items.by_frame ? t : 1);
    if (items.starts[i + 1] > tokens) return false;
  }
  return true;
}

Cursor find(const Items& items, int64_t rank) {
  const int64_t item = last_not_above(items.starts, items.count, rank);
  return {item, rank - items.starts[item]};
}

// How far complete units move what follows, and how many tokens of the next unit have been.
struct Moved {
  int64_t steps, within;
};

Moved moved(const Items& items, Cursor at) {
  if (!items.by_frame || at.item == items.count) return {items.steps[at.item], at.offset};
  const int64_t unit = items.unit(at.item), frame = at.offset / unit;
  return {items.steps[at.item] + frame * items.step(at.item), at.offset - frame * unit};
}

void fill_text(int64_t* const out[3], int64_t begin, int64_t end, int64_t first) {
  for (int row = 0; row < 3; ++row) {
    int64_t* to = out[row] + begin;
    for (int64_t i = 0; i < end - begin; ++i) to[i] = first + i;
  }
}

// `count` tokens of a unit, from its token `offset` on, to tokens `begin`, ….
void fill_unit(int64_t* const out[3], int64_t begin, int64_t count, int64_t offset, const Items& items, int64_t item,
               int64_t first) {
  const int64_t rows = items.rows(item), columns = items.columns(item);
  int64_t frame = offset / (rows * columns), row = offset / columns % rows, column = offset % columns;
  while (count > 0) {
    const int64_t some = columns - column < count ? columns - column : count;
    const int64_t time = first + items.time(item, frame);
    int64_t *t = out[0] + begin, *h = out[1] + begin, *w = out[2] + begin;
    for (int64_t i = 0; i < some; ++i) t[i] = time;
    for (int64_t i = 0; i < some; ++i) h[i] = first + row;
    for (int64_t i = 0; i < some; ++i) w[i] = first + column + i;
    begin += some;
    count -= some;
    column = 0;
    if (++row == rows) row = 0, ++frame;
  }
}

void raise_to(int64_t* value, int64_t candidate) {
  int64_t seen = __atomic_load_n(value, __ATOMIC_RELAXED);
  while (seen < candidate &&
         !__atomic_compare_exchange_n(value, &seen, candidate, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <typename T>
struct Plan {
  const MropePositions& a;
  const T* kinds;
  Items items[2];           // images, videos
  int64_t* ranks[2];        // [samples + 1], image and video tokens before each bound
  int64_t* origins;         // [samples + 1], how far all before each bound moves
  int64_t* chunk_ranks[2];  // [chunks + 1], image and video tokens before each chunk
  int64_t* failed;          // [chunks]
  int64_t chunks;

  explicit Plan(const MropePositions& given) : a(given), kinds(static_cast<const T*>(given.kinds)) {
    chunks = (a.tokens + kMropeChunk - 1) / kMropeChunk;
    int64_t* free = a.scratch;
    const auto take = [&](int64_t count) {
      int64_t* const taken = free;
      free += count;
      return taken;
    };
    const int64_t counts[2] = {a.images, a.videos};
    for (int m = 0; m < 2; ++m) {
      items[m] = {m ? a.video_grid : a.image_grid, m ? a.intervals : nullptr, take(counts[m] + 1), take(counts[m] + 1),
                  counts[m],    a.merge_size, m ? a.video_kind : a.image_kind, m == 1 && !a.intervals};
      ranks[m] = take(a.samples + 1);
      chunk_ranks[m] = take(chunks + 1);
    }
    origins = take(a.samples + 1);
    failed = take(chunks);
  }

  bool bounds_are_sound() const {
    if (a.cu_seqlens[0] != 0 || a.cu_seqlens[a.samples] != a.tokens) return false;
    for (int64_t n = 0; n < a.samples; ++n) {
      if (a.cu_seqlens[n + 1] < a.cu_seqlens[n]) return false;
    }
    return true;
  }

  // Pass 1 of a chunk: its counts, and at each bound in it the counts from the chunk's begin.
  void count(int64_t chunk) const {
    const int64_t begin = chunk * kMropeChunk;
    const int64_t end = begin + kMropeChunk < a.tokens ? begin + kMropeChunk : a.tokens;
    // The first bound that is not before this chunk.
    int64_t bound = begin ? last_not_above(a.cu_seqlens, a.samples, begin - 1) + 1 : 0;
    int64_t images = 0, videos = 0, place = begin, strange = 0;
    while (place < end || (bound <= a.samples && a.cu_seqlens[bound] < end)) {
      const int64_t next = bound <= a.samples && a.cu_seqlens[bound] < end ? a.cu_seqlens[bound] : end;
      for (int64_t i = place; i < next; ++i) {
        const T kind = kinds[i];
        images += kind == static_cast<T>(items[0].kind);
        videos += kind == static_cast<T>(items[1].kind);
        strange |= kind < 0 || kind > 2;
      }
      place = next;
      if (next < end) {
        ranks[0][bound] = images;
        ranks[1][bound] = videos;
        ++bound;
      }
    }
    chunk_ranks[0][chunk + 1] = images;
    chunk_ranks[1][chunk + 1] = videos;
    failed[chunk] = a.typed && strange;
  }

  // Between the passes: sums of counts, and whether every bound lies between two items.
  bool join() const {
    for (int64_t c = 0; c < chunks; ++c) {
      if (failed[c]) return false;
    }
    for (int64_t n = 0; n <= a.samples; ++n) origins[n] = a.cu_seqlens[n];
    for (int m = 0; m < 2; ++m) {
      chunk_ranks[m][0] = 0;
      for (int64_t c = 0; c < chunks; ++c) chunk_ranks[m][c + 1] += chunk_ranks[m][c];
      int64_t item = 0;
      for (int64_t n = 0; n <= a.samples; ++n) {
        const int64_t bound = a.cu_seqlens[n];
        const int64_t rank = bound == a.tokens ? chunk_ranks[m][chunks]
                                               : chunk_ranks[m][bound / kMropeChunk] + ranks[m][n];
        while (item < items[m].count && items[m].starts[item] < rank) ++item;
        if (items[m].starts[item] != rank) return false;
        origins[n] += items[m].steps[item] - rank;
      }
      if (item != items[m].count) return false;
    }
    for (int64_t n = 0; n < a.samples; ++n) {  // raised where frames reach farther
      a.deltas[n] = origins[n + 1] - origins[n] - (a.cu_seqlens[n + 1] - a.cu_seqlens[n]);
    }
    return true;
  }

  bool is_text(int64_t begin, int64_t end) const {
    int64_t other = 0;
    for (int64_t i = begin; i < end; ++i) {
      other |= kinds[i] == static_cast<T>(items[0].kind) || kinds[i] == static_cast<T>(items[1].kind);
    }
    return !other;
  }

  bool are_all(int64_t begin, int64_t end, int64_t kind) const {
    int64_t other = 0;
    for (int64_t i = begin; i < end; ++i) other |= kinds[i] != static_cast<T>(kind);
    return !other;
  }

  int64_t end_of_text(int64_t begin, int64_t end) const {
    while (begin + kBlock <= end && is_text(begin, begin + kBlock)) begin += kBlock;
    while (begin < end && is_text(begin, begin + 1)) ++begin;
    return begin;
  }

  // Pass 2 of a chunk: its positions. False: a unit is interrupted.
  bool write(int64_t chunk) const {
    int64_t* const out[3] = {a.position_ids, a.position_ids + a.tokens, a.position_ids + 2 * a.tokens};
    const int64_t begin = chunk * kMropeChunk;
    const int64_t end = begin + kMropeChunk < a.tokens ? begin + kMropeChunk : a.tokens;
    int64_t sample = last_not_above(a.cu_seqlens, a.samples, begin);
    Cursor cursors[2];
    int64_t position = begin;  // of the next token or unit, from the origin of the whole batch
    for (int m = 0; m < 2; ++m) {
      cursors[m] = find(items[m], chunk_ranks[m][chunk]);
      position += moved(items[m], cursors[m]).steps - chunk_ranks[m][chunk];
    }
    int64_t place = begin;
    while (place < end) {
      while (a.cu_seqlens[sample + 1] <= place) ++sample;
      const int64_t last = a.cu_seqlens[sample + 1] < end ? a.cu_seqlens[sample + 1] : end;
      const int64_t text = end_of_text(place, last);
      fill_text(out, place, text, position - origins[sample]);
      position += text - place;
      place = text;
      if (place == last) continue;
      const int m = kinds[place] == static_cast<T>(items[0].kind) ? 0 : 1;
      const Items& of = items[m];
      Cursor& at = cursors[m];
      const int64_t unit = of.unit(at.item), within = at.offset % unit;
      const int64_t some = unit - within < last - place ? unit - within : last - place;
      if (!are_all(place, place + some, of.kind)) return false;
      if (within && (place == a.cu_seqlens[sample] || !are_all(place - 1, place, of.kind))) return false;
      const int64_t first = position - origins[sample];
      fill_unit(out, place, some, within, of, at.item, first);
      place += some;
      at.offset += some;
      if (within + some == unit) {
        position += of.step(at.item);
        const int64_t farthest = first + of.time(at.item, of.frames(at.item) - 1);
        raise_to(a.deltas + sample, farthest + 1 - (a.cu_seqlens[sample + 1] - a.cu_seqlens[sample]));
      }
      if (at.offset == of.starts[at.item + 1] - of.starts[at.item]) at = {at.item + 1, 0};
    }
    return true;
  }
};

template <typename T>
int positions(const MropePositions& a) {
  const Plan<T> plan(a);
  if (!plan.bounds_are_sound()) return 1;
  for (const Items& items : plan.items) {
    if (!tabulate(items, a.tokens)) return 1;
  }
  const int64_t bytes = a.tokens * static_cast<int64_t>(sizeof(T));
  parallel_ranges(plan.chunks, bytes, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) plan.count(chunk);
  });
  if (!plan.join()) return 1;
  parallel_ranges(plan.chunks, 4 * bytes, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) plan.failed[chunk] = !plan.write(chunk);
  });
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    if (plan.failed[chunk]) return 1;
  }
  return 0;
}

}  // namespace

int mrope_positions(const MropePositions& a) { return a.narrow ? positions<int32_t>(a) : positions<int64_t>(a); }

}  // namespace M4OV_VARIANT
}  // namespace m4ov
