// Sines and cosines of a token's angles, straight from its integer positions. Included by heads.h only.
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
M4OV_INLINE void sin_cos(const Doubles (&x)[2], Floats (&sine)[2], Floats (&cosine)[2]) {
  const Doubles shift = Doubles{} + 0x1.8p52;  // adding it leaves the nearest whole number in the lowest bits
  Longs quarter[2];
  Doubles r[2], z[2], s[2], c[2];
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const Doubles shifted = x[k] * 0.6366197723675814 + shift, turns = shifted - shift;
    quarter[k] = reinterpret_cast<Longs>(shifted);
    r[k] = ((x[k] - turns * 0x1.921fbp+0) - turns * 0x1.5110bp-22) - turns * 0x1.18469898cc517p-44;
    z[k] = r[k] * r[k];
  }
  // Minimax on [-pi/4, pi/4], to 2^-37 and 2^-42.
  constexpr double kSine[] = {2.7183042224221538e-06, -0.0001983933408219465, 0.008333329383578857, -0.1666666664160695};
  constexpr double kCosine[] = {-2.720568441532735e-07, 2.47994593072637e-05, -0.0013888883496847631, 0.041666666619453584};
  for (int k = 0; k < 2; ++k) s[k] = z[k] * kSine[0] + kSine[1], c[k] = z[k] * kCosine[0] + kCosine[1];
#pragma GCC unroll 2
  for (int i = 2; i < 4; ++i) {
    for (int k = 0; k < 2; ++k) s[k] = s[k] * z[k] + kSine[i], c[k] = c[k] * z[k] + kCosine[i];
  }
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    s[k] = r[k] + r[k] * z[k] * s[k];
    c[k] = 1.0 + z[k] * (z[k] * c[k] - 0.5);
    const Longs swap = -(quarter[k] & 1);
    const Longs sin_bits = reinterpret_cast<Longs>(s[k]), cos_bits = reinterpret_cast<Longs>(c[k]);
    const Longs a = ((sin_bits & ~swap) | (cos_bits & swap)) ^ ((quarter[k] & 2) << 62);
    const Longs b = ((cos_bits & ~swap) | (sin_bits & swap)) ^ (((quarter[k] + 1) & 2) << 62);
    sine[k] = __builtin_convertvector(reinterpret_cast<Doubles>(a), Floats);
    cosine[k] = __builtin_convertvector(reinterpret_cast<Doubles>(b), Floats);
  }
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
    if (a.positions) return;
    walk_.seek(first);
    stride_ = (half + 2 * kDoubles - 1) / (2 * kDoubles) * (2 * kDoubles);
    kept_ = kValues / (2 * stride_) < kCoordinates ? kValues / (2 * stride_) : kCoordinates;
    for (int64_t i = 0; i < half; ++i) axis_[i] = a.axis[i];
  }

  // sine[i] and cosine[i] for i < half; the arrays have room for two vectors more.
  void next(int64_t token, float* sine, float* cosine) {
    if (a_.positions) {
      double position[3] = {0.0, 0.0, 0.0};
      for (int64_t j = 0; j < a_.axes; ++j) position[j] = at(j * a_.axis_stride + token * a_.token_stride);
      return compute(position, sine, cosine);
    }
    const int64_t row = walk_.row(), column = walk_.column();
    walk_.next();
    if (row >= kept_ || column >= kept_) {
      const double position[3] = {static_cast<double>(row), static_cast<double>(column), 0.0};
      return compute(position, sine, cosine);
    }
    const float *of_row = keep(row), *of_column = keep(column);
    for (int64_t i = 0; i < half_; ++i) {
      sine[i] = axis_[i] ? of_column[i] : of_row[i];
      cosine[i] = axis_[i] ? of_column[stride_ + i] : of_row[stride_ + i];
    }
  }

 private:
  // Vectors go two by two: one alone waits for its own results.
  void compute(const double (&position)[3], float* sine, float* cosine) const {
    Longs p[3];
    for (int j = 0; j < 3; ++j) p[j] = reinterpret_cast<Longs>(Doubles{} + position[j]);
    for (int64_t i = 0; i < half_; i += 2 * kDoubles) {
      Doubles angle[2];
      for (int k = 0; k < 2; ++k) {
        const auto mask = [&](int j) { return vector_at<Longs>(chosen_[j] + i + k * kDoubles); };
        const Longs position_bits = (p[0] & mask(0)) | (p[1] & mask(1)) | (p[2] & mask(2));
        angle[k] = reinterpret_cast<Doubles>(position_bits) * vector_at<Doubles>(inv_freq_ + i + k * kDoubles);
        // The product of two float32 is exact in float64: rounded here, it is the float32 product.
        if (a_.single) angle[k] = __builtin_convertvector(__builtin_convertvector(angle[k], Floats), Doubles);
      }
      Floats s[2], c[2];
      sin_cos(angle, s, c);
      memcpy(sine + i, s, sizeof s);
      memcpy(cosine + i, c, sizeof c);
    }
  }

  // Sines and cosines of one coordinate of a grid, at all frequencies: a grid has few of them, and many tokens.
  const float* keep(int64_t coordinate) {
    float* to = values_ + 2 * stride_ * coordinate;
    if (!(known_[coordinate / 64] >> coordinate % 64 & 1)) {
      const double at = static_cast<double>(coordinate);
      compute({at, at, at}, to, to + stride_);
      known_[coordinate / 64] |= uint64_t{1} << coordinate % 64;
    }
    return to;
  }

  double at(int64_t index) const {
    const int64_t whole = a_.wide ? static_cast<const int64_t*>(a_.positions)[index]
                                  : static_cast<const int32_t*>(a_.positions)[index];
    return a_.single ? static_cast<double>(static_cast<float>(whole)) : static_cast<double>(whole);
  }

  const RopeAngles& a_;
  int64_t half_;
  GridWalk walk_;
  static constexpr int64_t kCoordinates = 256, kValues = 16384;
  int64_t stride_ = 0, kept_ = 0;  // coordinates below that are kept
  uint64_t known_[kCoordinates / 64] = {};
  int32_t axis_[kMaxHalf];
  alignas(64) double inv_freq_[kMaxHalf + 2 * kDoubles] = {};
  alignas(64) uint64_t chosen_[3][kMaxHalf + 2 * kDoubles] = {};
  alignas(64) float values_[kValues];
};

}  // namespace
}  // namespace M4OV_VARIANT
}  // namespace m4ov
