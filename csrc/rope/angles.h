// Sines and cosines of a token's angles, straight from its integer positions. Included by cpu_rope.cpp only.
//
// In float64, which costs a few percent of what a token's heads do: so no angle is too large for a cheap reduction, and
// the results, rounded once to float32, have the same bits on every instruction set.
#pragma once

#include "../common/simd.h"
#include "kernels.h"

namespace m4ov {
namespace M4OV_VARIANT {
namespace {

constexpr int kMaxHalf = kMaxRopeDim / 2;
constexpr int kDoubles = kLanes / 2;
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes / 2)));

template <typename Vector, typename Element>
M4OV_INLINE Vector vector_at(const Element* p) {
  Vector x;
  memcpy(&x, p, sizeof x);
  return x;
}

// sin and cos, within 0.51 units in the last place of float32 for |x| up to 2^31. pi/2 is taken off in three parts; the
// first two have 22 bits, so that their products with the number of quarter turns are exact.
M4OV_INLINE void sin_cos(Doubles x, Floats& sine, Floats& cosine) {
  const Doubles shift = Doubles{} + 0x1.8p52;  // adding it leaves the nearest whole number in the lowest bits
  const Doubles shifted = x * 0.6366197723675814 + shift;
  const Longs quarter = reinterpret_cast<Longs>(shifted);
  const Doubles turns = shifted - shift;
  const Doubles r = ((x - turns * 0x1.921fbp+0) - turns * 0x1.5110bp-22) - turns * 0x1.18469898cc517p-44;
  const Doubles z = r * r;
  // Minimax on [-pi/4, pi/4], to 2^-37 and 2^-42.
  Doubles s = z * 2.7183042224221538e-06 - 0.0001983933408219465;
  s = s * z + 0.008333329383578857;
  s = s * z - 0.1666666664160695;
  s = r + r * z * s;
  Doubles c = z * -2.720568441532735e-07 + 2.47994593072637e-05;
  c = c * z - 0.0013888883496847631;
  c = c * z + 0.041666666619453584;
  c = 1.0 + z * (z * c - 0.5);
  const Longs swap = -(quarter & 1), sin_bits = reinterpret_cast<Longs>(s), cos_bits = reinterpret_cast<Longs>(c);
  const Longs a = ((sin_bits & ~swap) | (cos_bits & swap)) ^ ((quarter & 2) << 62);
  const Longs b = ((cos_bits & ~swap) | (sin_bits & swap)) ^ (((quarter + 1) & 2) << 62);
  sine = __builtin_convertvector(reinterpret_cast<Doubles>(a), Floats);
  cosine = __builtin_convertvector(reinterpret_cast<Doubles>(b), Floats);
}

// Rows and columns of patches in merge order: image after image, frame after frame, in blocks of merge_size².
class GridWalk {
 public:
  GridWalk(const int64_t* grid, int64_t images, int64_t merge) : grid_(grid), images_(images), merge_(merge) {}

  void seek(int64_t token) {
    open(0);
    while (image_ < images_ && token >= frames_ * rows_ * columns_) {
      token -= frames_ * rows_ * columns_;
      open(image_ + 1);
    }
    if (image_ == images_) return;
    frames_ -= token / (rows_ * columns_);
    const int64_t patch = token % (rows_ * columns_), inner = patch % (merge_ * merge_);
    const int64_t block = patch / (merge_ * merge_), across = columns_ / merge_;
    row_ = block / across * merge_, column_ = block % across * merge_;
    y_ = inner / merge_, x_ = inner % merge_;
  }

  int64_t row() const { return row_ + y_; }
  int64_t column() const { return column_ + x_; }

  void next() {
    if (++x_ < merge_) return;
    x_ = 0;
    if (++y_ < merge_) return;
    y_ = 0;
    if ((column_ += merge_) < columns_) return;
    column_ = 0;
    if ((row_ += merge_) < rows_) return;
    row_ = 0;
    if (--frames_ == 0) open(image_ + 1);
  }

 private:
  void open(int64_t image) {
    row_ = column_ = y_ = x_ = 0;
    for (image_ = image; image_ < images_; ++image_) {
      const int64_t* size = grid_ + 3 * image_;
      frames_ = size[0], rows_ = size[1], columns_ = size[2];
      if (frames_ > 0 && rows_ > 0 && columns_ > 0) return;
    }
    frames_ = INT64_MAX, rows_ = columns_ = merge_;  // past the end, where the caller has checked that nothing is
  }

  const int64_t* grid_;
  int64_t images_, merge_;
  int64_t image_ = 0, frames_ = 0, rows_ = 0, columns_ = 0, row_ = 0, column_ = 0, y_ = 0, x_ = 0;
};

// One thread's angles; the tokens from `first` on, in order.
class Angles {
 public:
  Angles(const RopeAngles& a, int64_t half, int64_t first) : a_(a), half_(half), walk_(a.grid, a.images, a.merge_size) {
    for (int64_t i = 0; i < half; ++i) {
      inv_freq_[i] = a.inv_freq[i];
      for (int j = 0; j < 3; ++j) chosen_[j][i] = a.axis[i] == j ? ~uint64_t{0} : 0;
    }
    if (!a.positions) walk_.seek(first);
  }

  // sine[i] and cosine[i] for i < half; the arrays have room for a whole vector more.
  void next(int64_t token, float* sine, float* cosine) {
    double position[3] = {0.0, 0.0, 0.0};
    if (a_.positions) {
      for (int64_t j = 0; j < a_.axes; ++j) position[j] = at(j * a_.axis_stride + token * a_.token_stride);
    } else {
      position[0] = static_cast<double>(walk_.row()), position[1] = static_cast<double>(walk_.column());
      walk_.next();
    }
    const Longs p0 = reinterpret_cast<Longs>(Doubles{} + position[0]);
    const Longs p1 = reinterpret_cast<Longs>(Doubles{} + position[1]);
    const Longs p2 = reinterpret_cast<Longs>(Doubles{} + position[2]);
    for (int64_t i = 0; i < half_; i += kDoubles) {
      const auto mask = [&](int j) { return vector_at<Longs>(chosen_[j] + i); };
      const Longs position_bits = (p0 & mask(0)) | (p1 & mask(1)) | (p2 & mask(2));
      Doubles angle = reinterpret_cast<Doubles>(position_bits) * vector_at<Doubles>(inv_freq_ + i);
      // The product of two float32 is exact in float64: rounded here, it is the float32 product.
      if (a_.single) angle = __builtin_convertvector(__builtin_convertvector(angle, Floats), Doubles);
      Floats s, c;
      sin_cos(angle, s, c);
      memcpy(sine + i, &s, sizeof s);
      memcpy(cosine + i, &c, sizeof c);
    }
  }

 private:
  double at(int64_t index) const {
    const int64_t whole = a_.wide ? static_cast<const int64_t*>(a_.positions)[index]
                                  : static_cast<const int32_t*>(a_.positions)[index];
    return a_.single ? static_cast<double>(static_cast<float>(whole)) : static_cast<double>(whole);
  }

  const RopeAngles& a_;
  int64_t half_;
  GridWalk walk_;
  alignas(64) double inv_freq_[kMaxHalf + kDoubles] = {};
  alignas(64) uint64_t chosen_[3][kMaxHalf + kDoubles] = {};
};

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
