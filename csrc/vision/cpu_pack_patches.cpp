// pack_patches: images to the patches of a vision tower in one pass, with the bits of Pillow and NumPy.
//
// Pillow resizes each axis by itself: a resized row (or column) is a weighted sum of rows, in integers, rounded to eight
// bits. Here the sum over columns is a sum over rows too, of a transposed tile that stays in L1: one inner loop serves
// both. A strip (some rows of patches of one image) is the unit of work; what it needs of the first pass it makes as it
// goes, into a ring of rows.
#include "../common/parallel.h"
#include "bytes.h"
#include "kernels.h"
#include "normalise.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int64_t kTile = 64;   // resized columns of a transposed tile
constexpr int64_t kChunk = 64;  // rows that are resized horizontally together
constexpr int64_t kSlack = 64;  // what vectors may read or write behind a buffer, in bytes

constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

M4OV_INLINE const Window& window(const int32_t* table, int64_t ints, int64_t i) {
  return *reinterpret_cast<const Window*>(table + i * ints);
}

// Rows of pixels, as PackImage describes a source: if `pixel` is 1, channels are `channel` bytes apart. Beyond
// `readable` pixels of a row nothing may be read.
struct Lines {
  const uint8_t** rows;
  int64_t pixel, channel, channels, readable;
};

// How an image is resized, and how large the rows are that are made on the way.
struct Plan {
  bool vertical, horizontal, vertical_first;
  int64_t ring_rows;      // of the ring: those that one resized row or row of patches needs, and a chunk
  int64_t plane, planes;  // a row that has only been resized vertically: bytes of each of its planes
  int64_t column_plane;   // a row that has been resized horizontally has a plane for each channel
  int64_t line;           // bytes of the larger of both
};

Plan plan_of(const PackPatches& a, const PackImage& image) {
  Plan plan;
  plan.vertical = image.vertical != nullptr;
  plan.horizontal = image.horizontal != nullptr;
  plan.vertical_first = plan.vertical && (image.vertical_first || !plan.horizontal);
  plan.ring_rows = kChunk + (plan.vertical && !plan.vertical_first ? image.vertical_window : a.patch_size);
  plan.planes = image.pixel == 1 ? image.channels : 1;
  plan.plane = round_up(image.width * image.pixel + kSlack, 64);
  plan.column_plane = round_up(image.resized_width + 16, 64);
  plan.line = larger(plan.planes * plan.plane, image.channels * plan.column_plane + kSlack);
  return plan;
}

struct Buffers {
  // Addresses of rows: of a row of patches; of a chunk, and where it goes; of a weighted sum.
  const uint8_t **lines, **chunk, **terms;
  uint8_t** targets;
  uint8_t *made, *ring;            // rows that were resized vertically; horizontally
  uint8_t *tile, *resized_tile, *edge;
  uint8_t* patch;  // [3] planes of bytes
  char* values;    // one channel of a patch, as it will be stored
};

// Lays buffers that serve every image out from `base` on, and returns their size.
int64_t lay_out(const PackPatches& a, uintptr_t base, Buffers* buffers) {
  const int64_t rows = larger(a.patch_size, kChunk), square = a.patch_size * a.patch_size;
  int64_t terms = 0, made = 0, ring = 0, tile = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const PackImage& image = a.images[i];
    const Plan plan = plan_of(a, image);
    terms = larger(terms, image.vertical_window);
    if (plan.vertical) made = larger(made, rows * plan.line);
    if (!plan.horizontal) continue;
    ring = larger(ring, (plan.ring_rows + 1) * plan.line);  // one more, for rows that nobody wants
    tile = larger(tile, kTile * (image.width / image.resized_width + 1) + image.horizontal_window + 32);
  }
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* here = reinterpret_cast<char*>(base + used);
    used += round_up(bytes + kSlack, 64);
    return here;
  };
  buffers->lines = reinterpret_cast<const uint8_t**>(take(a.patch_size * 8));
  buffers->chunk = reinterpret_cast<const uint8_t**>(take(kChunk * 8));
  buffers->targets = reinterpret_cast<uint8_t**>(take(kChunk * 8));
  buffers->terms = reinterpret_cast<const uint8_t**>(take(terms * 8));
  buffers->made = reinterpret_cast<uint8_t*>(take(made));
  buffers->ring = reinterpret_cast<uint8_t*>(take(ring));
  buffers->tile = reinterpret_cast<uint8_t*>(take(tile * 3 * kChunk));
  buffers->resized_tile = reinterpret_cast<uint8_t*>(take((kTile + 16) * 3 * kChunk));
  buffers->edge = reinterpret_cast<uint8_t*>(take(kChunk * 16));
  buffers->patch = reinterpret_cast<uint8_t*>(take(3 * round_up(square + 16 + kGroup, 64)));
  buffers->values = take(square * 4);
  return used;
}

// ---- Columns

// The pixels x0 to x1 (and up to 15 more) of one plane of `padded` rows, transposed: byte r of tile[x - x0][channel] is
// row r's.
template <int kPixel>
void transpose_in(uint8_t* tile, const Lines& from, int64_t plane, int64_t padded, int64_t x0, int64_t x1,
                  int64_t width, uint8_t* edge) {
  const int64_t begin = x0 * kPixel, end = smaller(x1, width) * kPixel, bytes = width * kPixel;
  for (int64_t block = begin; block < end; block += 16) {
    const int64_t at = larger(0, smaller(block, bytes - 16));  // the last one ends with the row
    for (int64_t row = 0; row < padded; row += 16) {
      __m128i x[16];
      for (int i = 0; i < 16; ++i) {
        const uint8_t* p = from.rows[row + i] + plane * from.channel;
        if (bytes < 16) {
          memcpy(edge, p, bytes);
          p = edge;
        }
        x[i] = load16(p + at);
        if (block % 64 < 16) _mm_prefetch(reinterpret_cast<const char*>(p + at + 384), _MM_HINT_T0);
      }
      transpose16(x);
      for (int i = 0; i < 16; ++i) {
        const int64_t byte = at + i;
        int64_t place = byte - begin;
        if (place < 0) continue;
        if constexpr (kPixel == 1) place = place * from.channels + plane;
        if constexpr (kPixel == 4) {
          if (byte % 4 == 3) continue;
          place = place / 4 * 3 + byte % 4;
        }
        store16(tile + place * padded + row, x[i]);
      }
    }
  }
}

// Resizes `count` (at most kChunk) rows horizontally, into the ring from row `first` on. kChunk rows can be read.
void resize_columns(const PackImage& image, const Plan& plan, const Buffers& b, const Lines& from, int64_t count,
                    int64_t first) {
  const int64_t padded = round_up(count, 16), pixel = image.channels * padded;
  const auto at = [&](int64_t x) -> const Window& { return window(image.horizontal, image.horizontal_window, x); };
  for (int64_t i = 0; i < padded; ++i) {
    b.targets[i] = b.ring + (i < count ? (first + i) % plan.ring_rows : plan.ring_rows) * plan.line;
  }
  for (int64_t begin = 0; begin < image.resized_width; begin += kTile) {
    const int64_t end = smaller(begin + kTile, image.resized_width);
    const int64_t x0 = at(begin).start, x1 = at(end - 1).start + 2 * at(end - 1).pairs;
    for (int64_t plane = 0; plane < plan.planes; ++plane) {
      const auto fill = image.pixel == 1 ? transpose_in<1> : image.pixel == 3 ? transpose_in<3> : transpose_in<4>;
      fill(b.tile, from, plane, padded, x0, x1, image.width, b.edge);
    }
    for (int64_t x = begin; x < end; ++x) {
      const uint8_t* base = b.tile + (at(x).start - x0) * pixel;
      weigh_padded(b.resized_tile + (x - begin) * pixel, pixel, at(x), [=](int64_t i) { return base + i * pixel; });
    }
    for (int64_t channel = 0; channel < image.channels; ++channel) {
      for (int64_t x = begin; x < end; x += 16) {
        for (int64_t row = 0; row < padded; row += 16) {
          __m128i block[16];
          const uint8_t* source = b.resized_tile + (x - begin) * pixel + channel * padded + row;
          for (int i = 0; i < 16; ++i) block[i] = load16(source + i * pixel);
          transpose16(block);
          for (int i = 0; i < 16; ++i) store16(b.targets[row + i] + channel * plan.column_plane + x, block[i]);
        }
      }
    }
  }
}

// ---- Rows

void resize_row_of_source(const PackImage& image, const Plan& plan, const Buffers& b, int64_t y, uint8_t* target) {
  const Window& rows = window(image.vertical, image.vertical_window, y);
  for (int64_t plane = 0; plane < plan.planes; ++plane) {
    for (int64_t i = 0; i < 2 * rows.pairs; ++i) {
      b.terms[i] = image.source + smaller(rows.start + i, image.height - 1) * image.row + plane * image.channel;
    }
    weigh_exactly(target + plane * plan.plane, image.width * image.pixel, rows, [&](int64_t i) { return b.terms[i]; });
  }
}

void resize_row_of_ring(const PackImage& image, const Plan& plan, const Buffers& b, int64_t y, uint8_t* target) {
  const Window& rows = window(image.vertical, image.vertical_window, y);
  for (int64_t i = 0; i < 2 * rows.pairs; ++i) b.terms[i] = b.ring + (rows.start + i) % plan.ring_rows * plan.line;
  weigh_padded(target, image.channels * plan.column_plane, rows, [&](int64_t i) { return b.terms[i]; });
}

// ---- Patches

struct Normalisation {
  Channel channels[3];
  bool streamed;
};

// The bytes of the patch whose upper left corner is pixel (0, x) of `from`, a plane after the other.
template <int kPixel>
void collect(const Lines& from, int64_t x, int64_t size, uint8_t* planes, int64_t plane_bytes) {
  for (int64_t y = 0; y < size; ++y) {
    for (int64_t part = 0; part < size; part += 16) {  // what is too much, the next row overwrites
      for (int64_t plane = 0; plane < (kPixel == 1 ? from.channels : 1); ++plane) {
        const uint8_t* p = from.rows[y] + plane * from.channel + (x + part) * kPixel;
        uint8_t copy[16 * kPixel];
        if (x + part + 16 > from.readable) {
          memcpy(copy, p, (from.readable - x - part) * kPixel);
          p = copy;
        }
        __m128i channels[3];
        split_channels<kPixel>(p, channels);
        uint8_t* target = planes + plane * plane_bytes + y * size + part;
        for (int c = 0; c < (kPixel == 1 ? 1 : 3); ++c) store16(target + c * plane_bytes, channels[c]);
      }
    }
  }
}

template <typename T>
void write_patches(const PackPatches& a, const PackImage& image, const Buffers& b, const Lines& from, int64_t row,
                   const Normalisation& how) {
  const int64_t size = a.patch_size, square = size * size, merge = a.merge_size;
  const int64_t across = image.resized_width / size, plane_bytes = round_up(square + 16 + kGroup, 64);
  const auto take = from.pixel == 1 ? collect<1> : from.pixel == 3 ? collect<3> : collect<4>;
  for (int64_t column = 0; column < across; ++column) {
    take(from, column * size, size, b.patch, plane_bytes);
    const int64_t block = row / merge * (across / merge) + column / merge;
    const int64_t patch = image.first_patch + block * merge * merge + row % merge * merge + column % merge;
    for (int64_t c = 0; c < 3; ++c) {
      T* target = static_cast<T*>(a.output) + ((patch * 3 + c) * a.temporal_patch_size + image.slot) * square;
      write_channel(target, image.copies, b.patch + (from.channels == 1 ? 0 : c) * plane_bytes, square, how.channels[c],
                    how.streamed, reinterpret_cast<T*>(b.values));
    }
  }
}

// The rows of patches [begin, end) of one image.
template <typename T>
void pack_strip(const PackPatches& a, const PackImage& image, const Buffers& b, int64_t begin, int64_t end,
                const Normalisation& how) {
  const Plan plan = plan_of(a, image);
  const int64_t size = a.patch_size;
  const auto last_of = [&](int64_t y) {  // the row of the source behind those that the resized row y needs
    const Window& rows = window(image.vertical, image.vertical_window, y);
    return smaller(rows.start + 2 * rows.pairs, image.height);
  };
  const bool both = plan.horizontal && plan.vertical && !plan.vertical_first;
  int64_t done = both ? window(image.vertical, image.vertical_window, begin * size).start : begin * size;
  const int64_t all = both ? last_of(end * size - 1) : end * size;
  const auto fill_ring = [&](int64_t until) {
    while (done < until) {
      const int64_t count = smaller(kChunk, all - done);
      for (int64_t i = 0; i < count; ++i) {
        if (plan.vertical_first) {
          resize_row_of_source(image, plan, b, done + i, b.made + i * plan.line);
          b.chunk[i] = b.made + i * plan.line;
        } else {
          b.chunk[i] = image.source + (done + i) * image.row;
        }
      }
      for (int64_t i = count; i < kChunk; ++i) b.chunk[i] = b.chunk[count - 1];
      const int64_t channel = plan.vertical_first ? plan.plane : image.channel;
      resize_columns(image, plan, b, {b.chunk, image.pixel, channel, image.channels, image.width}, count, done);
      done += count;
    }
  };
  for (int64_t row = begin; row < end; ++row) {
    Lines lines = {b.lines, image.pixel, image.channel, image.channels, image.width};
    if (plan.horizontal) {
      lines = {b.lines, 1, plan.column_plane, image.channels, INT64_MAX};
      if (!both) fill_ring(row * size + size);
    } else if (plan.vertical) {
      lines.channel = plan.plane;
    }
    for (int64_t i = 0; i < size; ++i) {
      const int64_t y = row * size + i;
      uint8_t* made = b.made + i * plan.line;
      if (both) {
        fill_ring(last_of(y));
        resize_row_of_ring(image, plan, b, y, made);
      } else if (plan.vertical && !plan.horizontal) {
        resize_row_of_source(image, plan, b, y, made);
      }
      b.lines[i] = plan.horizontal && !both ? b.ring + y % plan.ring_rows * plan.line
                   : plan.vertical          ? made
                                            : image.source + y * image.row;
    }
    write_patches<T>(a, image, b, lines, row, how);
  }
}

// The image that strip `strip` belongs to.
const PackImage& image_of(const PackPatches& a, int64_t strip) {
  int64_t low = 0, high = a.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.images[middle].first_strip <= strip ? low : high) = middle;
  }
  return a.images[low];
}

template <typename T>
void pack(const PackPatches& a, int64_t bytes_each) {
  int64_t next = 0;
  const int64_t output = a.patches * 3 * a.temporal_patch_size * a.patch_size * a.patch_size * sizeof(T);
#pragma omp parallel num_threads(static_cast<int>(smaller(a.threads, a.strips)))
  {
    Buffers buffers;
    lay_out(a, reinterpret_cast<uintptr_t>(a.scratch) + omp_get_thread_num() * bytes_each, &buffers);
    Normalisation how = {{}, output >= kStreamBytes};
    for (int c = 0; c < 3; ++c) how.channels[c] = channel_of(a.mean[c], a.std[c]);
    for (;;) {
      const int64_t strip = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (strip >= a.strips) break;
      const PackImage& image = image_of(a, strip);
      const int64_t begin = (strip - image.first_strip) * a.strip_rows;
      const int64_t end = smaller(begin + a.strip_rows, image.resized_height / a.patch_size);
      pack_strip<T>(a, image, buffers, begin, end, how);
    }
    fence();
  }
}

}  // namespace

int64_t pack_patches(const PackPatches& a) {
  Buffers buffers;
  const int64_t bytes_each = lay_out(a, 0, &buffers);
  if (a.scratch) with_dtype(a.dtype, [&](auto tag) { pack<typename decltype(tag)::type>(a, bytes_each); });
  return bytes_each;
}

}  // namespace M4OV_VARIANT
}  // namespace m4ov
