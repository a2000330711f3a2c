// Plain loops, one element at a time: the C++ truth, and the fallback on any CPU. Sums run in double for fp32 too: with
// one lane a sum is one long chain, and its rounding errors would be several times those of the vector kernels.
#pragma once

#include <cstdint>

#include "base/bf16.h"
#include "base/half.h"

namespace fastff {
namespace {

template <class T>
struct Vec {
  using Reg = double;
  static constexpr int width = 1, registers = 16;
  static Reg zero() { return 0; }
  static Reg set(T v) { return v; }
  static Reg load(const T* p) { return *p; }
  static Reg load(const Bf16* p) { return to_float(*p); }
  static Reg load(const Half* p) { return to_float(*p); }
  static Reg load(const int8_t* p) { return *p; }
  template <class W>
  static Reg load_n(const W* p, int64_t) {
    return load(p);
  }
  static void store(T* p, Reg v) { *p = static_cast<T>(v); }
  static void store(Half* p, Reg v) { *p = to_half(static_cast<float>(v)); }
  static void stream(T* p, Reg v) { store(p, v); }
  static void store_n(T* p, Reg v, int64_t) { *p = static_cast<T>(v); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static T sum(Reg v) { return static_cast<T>(v); }
};

// Sums of products in 16 bits, in sixteen parts: element i in part (i / 2) % 16. A Reg is 32 elements, Sums the sixteen
// parts, and sums() adds up the parts of four of them. No part overflows (layer/router_quantise.h).
template <>
struct Vec<int16_t> {
  struct Reg {
    int16_t element[32];
  };
  struct Sums {
    int32_t part[16];
  };
  static constexpr int width = 32;
  static Sums zero() { return {}; }
  static Reg load(const int16_t* p) {
    Reg reg;
    for (int i = 0; i < width; ++i) reg.element[i] = p[i];
    return reg;
  }
  static Sums dot(const Reg& a, const Reg& b, Sums c) {
    for (int i = 0; i < 16; ++i)
      c.part[i] += a.element[2 * i] * b.element[2 * i] + a.element[2 * i + 1] * b.element[2 * i + 1];
    return c;
  }
  static void sums(const Sums& a, const Sums& b, const Sums& c, const Sums& d, float* out) {
    const Sums* const all[4] = {&a, &b, &c, &d};
    for (int k = 0; k < 4; ++k) {
      float total = 0;
      for (int i = 0; i < 16; ++i) total += static_cast<float>(all[k]->part[i]);
      out[k] = total;
    }
  }
};

void fence() {}

}  // namespace
}  // namespace fastff
