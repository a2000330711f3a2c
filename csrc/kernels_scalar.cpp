// Plain loops, one element at a time: the C++ truth, and the fallback on any CPU.
#include <cstdint>

namespace fastff {
namespace {

template <class T>
struct Vec {
  using Reg = T;
  static constexpr int width = 1, registers = 16;
  static Reg zero() { return T(0); }
  static Reg set(T v) { return v; }
  static Reg load(const T* p) { return *p; }
  static Reg load_n(const T* p, int64_t) { return *p; }
  static void store(T* p, Reg v) { *p = v; }
  static void store_n(T* p, Reg v, int64_t) { *p = v; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static T sum(Reg v) { return v; }
};

bool supported() { return true; }

}  // namespace
}  // namespace fastff

#define FASTFF_ISA_NAME scalar
#include "kernels_impl.h"
