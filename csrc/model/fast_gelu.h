// GELU for many numbers at once.
#pragma once

#include <cmath>

#include "layer/activations.h"

namespace fastff {
namespace {

// gelu(x) = max(x, 0) - h(|x|), where h(a) = a * (1 - Phi(a)) is a low bump that is zero beyond a = 5.1 but for 1e-6: one
// polynomial in place of erf's two ranges and an exponential. Absolute error below 1.1e-6.
struct FastGelu {
  template <class T>
  FASTFF_INLINE static T value(T x) {
    constexpr T kEnd = T(5.1);
    constexpr T kBump[] = {  // Chebyshev interpolation of h in t = 2 a / kEnd - 1, lowest power first
        T(0.013734672), T(-0.08671962), T(0.22615066),  T(-0.27264234), T(0.021142758),
        T(0.40001988),  T(-0.52239746), T(0.14170542),  T(0.3080883),   T(-0.30710228),
        T(-0.013429328), T(0.15383507), T(-0.047865812), T(-0.029096039), T(0.014577038)};
    const T a = std::fabs(x), near = a > kEnd ? kEnd : a, t = near * (2 / kEnd) - 1;
    T bump = kBump[14];
#pragma GCC unroll 14
    for (int i = 13; i >= 0; --i) bump = bump * t + kBump[i];
    return (x > 0 ? x : T(0)) - bump;  // NaN stays NaN in the bump
  }
};

}  // namespace
}  // namespace fastff
