// Activations and their derivatives, branch-free so that loops over them vectorise.
// fp32 uses polynomials of about one ulp; fp64, which exists for tests, uses the C library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "fastff.h"

// Inlined whatever else a file holds: only then do loops over them vectorise.
#define FASTFF_INLINE [[gnu::always_inline]] inline

namespace fastff {
namespace {

FASTFF_INLINE float exp_(float x) {
  // exp(x) = 2^k * exp(r), |r| <= ln(2)/2, with ln(2) split in two so that r is exact.
  float bounded = x > 88.0f ? 88.0f : x;
  bounded = bounded < -87.0f ? -87.0f : bounded;  // beyond both ends: infinity and zero, below
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float k = shifted - 12582912.0f;
  const float r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;  // unsigned: the high bits of `shifted` are meant to fall out of the shift
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // the low bits of `shifted` hold k
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  float y = p * scale;
  y = x > 88.0f ? std::numeric_limits<float>::infinity() : y;
  y = x < -87.0f ? 0.0f : y;  // not 1e-38, which times a large x would count
  return x != x ? x : y;
}

FASTFF_INLINE float erf_(float x) {
  // Least-squares fits: erf(x) / x in x^2 below 1, log(erfc) on [1, 4]. Absolute error below 1.5e-7.
  const float a = std::fabs(x);
  const float u = x * x;
  float small = 7.882497448008507e-05f;
  small = small * u - 0.0008018855005502701f;
  small = small * u + 0.005189312156289816f;
  small = small * u - 0.02685432881116867f;
  small = small * u + 0.11283597350120544f;
  small = small * u - 0.3761262595653534f;
  small = small * u + 1.1283791065216064f;
  small *= x;
  const float t = a > 4.0f ? 4.0f : a;
  float q = 1.6140616025950294e-06f;
  q = q * t - 4.559062290354632e-05f;
  q = q * t + 0.0005927695310674608f;
  q = q * t - 0.004740222357213497f;
  q = q * t + 0.02636471763253212f;
  q = q * t - 0.10997824370861053f;
  q = q * t - 0.6319370865821838f;
  q = q * t - 1.1301666498184204f;
  q = q * t + 0.00030321296071633697f;
  const float big = std::copysign(1.0f - exp_(q), x);
  return a < 1.0f ? small : big;
}

FASTFF_INLINE float tanh_(float x) {
  const float a = std::fabs(x);
  const float u = x * x;
  // Odd Taylor terms below 0.3 keep the relative error small where 1 - 2 / (e + 1) cancels.
  float small = -1382.0f / 155925;
  small = small * u + 62.0f / 2835;
  small = small * u - 17.0f / 315;
  small = small * u + 2.0f / 15;
  small = small * u - 1.0f / 3;
  small = x + x * u * small;
  const float big = std::copysign(1.0f - 2.0f / (exp_(2 * a) + 1.0f), x);
  const float y = a < 0.3f ? small : big;
  return x != x ? x : y;
}

FASTFF_INLINE double exp_(double x) { return std::exp(x); }
FASTFF_INLINE double erf_(double x) { return std::erf(x); }
FASTFF_INLINE double tanh_(double x) { return std::tanh(x); }

template <class T>
constexpr T kRootHalf = T(0.70710678118654752440);
template <class T>
constexpr T kInvRootTwoPi = T(0.39894228040143267794);
template <class T>
constexpr T kRootTwoOverPi = T(0.79788456080286535588);
template <class T>
constexpr T kGeluCubic = T(0.044715);

template <class T>
FASTFF_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp_(-x));
}

// One struct an activation: value(x) and slope(x).
struct Gelu {
  template <class T>
  FASTFF_INLINE static T value(T x) {
    return x * T(0.5) * (T(1) + erf_(x * kRootHalf<T>));
  }
  template <class T>
  FASTFF_INLINE static T slope(T x) {
    return T(0.5) * (T(1) + erf_(x * kRootHalf<T>)) + x * kInvRootTwoPi<T> * exp_(T(-0.5) * x * x);
  }
};
struct GeluTanh {
  template <class T>
  FASTFF_INLINE static T value(T x) {
    return T(0.5) * x * (T(1) + tanh_(kRootTwoOverPi<T> * (x + kGeluCubic<T> * x * x * x)));
  }
  template <class T>
  FASTFF_INLINE static T slope(T x) {
    T near = x > T(30) ? T(30) : x;  // further out the slope is 0 or 1, and powers of x would overflow
    near = near < T(-30) ? T(-30) : near;
    const T t = tanh_(kRootTwoOverPi<T> * (near + kGeluCubic<T> * near * near * near));
    const T inner = kRootTwoOverPi<T> * (T(1) + T(3) * kGeluCubic<T> * near * near);
    return T(0.5) * (T(1) + t) + T(0.5) * near * (T(1) - t * t) * inner;
  }
};
struct Relu {
  template <class T>
  FASTFF_INLINE static T value(T x) {
    return x <= T(0) ? T(0) : x;  // NaN stays NaN
  }
  template <class T>
  FASTFF_INLINE static T slope(T x) {
    return x <= T(0) ? T(0) : T(1);
  }
};
struct Silu {
  template <class T>
  FASTFF_INLINE static T value(T x) {
    return x * sigmoid(x);
  }
  template <class T>
  FASTFF_INLINE static T slope(T x) {
    const T s = sigmoid(x);
    return s * (T(1) + x * (T(1) - s));
  }
};
struct Identity {
  template <class T>
  FASTFF_INLINE static T value(T x) {
    return x;
  }
  template <class T>
  FASTFF_INLINE static T slope(T) {
    return T(1);
  }
};
struct Abs {
  template <class T>
  FASTFF_INLINE static T value(T x) {
    return std::fabs(x);
  }
  template <class T>
  FASTFF_INLINE static T slope(T x) {
    return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
  }
};

// Loops run over whole vectors: callers pad their buffers to kPad elements.
constexpr int64_t kPad = 16;
inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

template <class A, class T>
void map_value(const T* __restrict x, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < padded(n); ++i) y[i] = A::template value<T>(x[i]);
}
template <class A, class T>
void map_both(const T* __restrict x, T* __restrict y, T* __restrict slope, int64_t n) {
  for (int64_t i = 0; i < padded(n); ++i) {
    y[i] = A::template value<T>(x[i]);
    slope[i] = A::template slope<T>(x[i]);
  }
}

// swiglu maps its scores through silu; the product with the value scores is the caller's.
template <class T>
void activate(int activation, const T* x, T* y, int64_t n) {
  switch (activation) {
    case FASTFF_GELU: return map_value<Gelu>(x, y, n);
    case FASTFF_GELU_TANH: return map_value<GeluTanh>(x, y, n);
    case FASTFF_RELU: return map_value<Relu>(x, y, n);
    case FASTFF_IDENTITY: return map_value<Identity>(x, y, n);
    case FASTFF_ABS: return map_value<Abs>(x, y, n);
    default: return map_value<Silu>(x, y, n);
  }
}
template <class T>
void activate_with_slope(int activation, const T* x, T* y, T* slope, int64_t n) {
  switch (activation) {
    case FASTFF_GELU: return map_both<Gelu>(x, y, slope, n);
    case FASTFF_GELU_TANH: return map_both<GeluTanh>(x, y, slope, n);
    case FASTFF_RELU: return map_both<Relu>(x, y, slope, n);
    case FASTFF_IDENTITY: return map_both<Identity>(x, y, slope, n);
    case FASTFF_ABS: return map_both<Abs>(x, y, slope, n);
    default: return map_both<Silu>(x, y, slope, n);
  }
}

}  // namespace
}  // namespace fastff
