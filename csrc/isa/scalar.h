// Plain loops, one element at a time: the C++ truth, and the fallback on any CPU. Sums run in double for fp32 too: with
// one lane a sum is one long chain, and its rounding errors would be several times those of the vector kernels.
#pragma once

#include <cstdint>

#include "base/bf16.h"

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
  static Reg load(const int8_t* p) { return *p; }
  template <class W>
  static Reg load_n(const W* p, int64_t) {
    return load(p);
  }
  static void store(T* p, Reg v) { *p = static_cast<T>(v); }
  static void stream(T* p, Reg v) { store(p, v); }
  static void store_n(T* p, Reg v, int64_t) { *p = static_cast<T>(v); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static T sum(Reg v) { return static_cast<T>(v); }
};

void fence() {}

}  // namespace
}  // namespace fastff
