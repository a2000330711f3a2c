// NEON (Advanced SIMD), which every AArch64 processor has.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "base/bf16.h"
#include "base/half.h"

namespace fastff {
namespace {

template <class T>
struct Vec;

// The first n elements, zeros after them. NEON has no masked loads.
template <class T, int width>
struct Part {
  T elements[width] = {};
  Part(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) elements[i] = p[i];
  }
};

template <>
struct Vec<float> {
  using Reg = float32x4_t;
  static constexpr int width = 4, registers = 32;
  static Reg zero() { return vdupq_n_f32(0); }
  static Reg set(float v) { return vdupq_n_f32(v); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load_n(const float* p, int64_t n) { return load(Part<float, width>(p, n).elements); }
  static Reg load(const Bf16* p) {
    const uint32x4_t bits = vmovl_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)));
    return vreinterpretq_f32_u32(vshlq_n_u32(bits, 16));
  }
  static Reg load_n(const Bf16* p, int64_t) { return load(p); }
  static Reg load(const Half* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static Reg load(const int8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, sizeof four);
    const int16x4_t wide = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))));
    return vcvtq_f32_s32(vmovl_s16(wide));
  }
  static Reg load_n(const int8_t* p, int64_t) { return load(p); }
  static void store(float* p, Reg v) { vst1q_f32(p, v); }
  static void store(Half* p, Reg v) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }
  static void stream(float* p, Reg v) { store(p, v); }
  static void store_n(float* p, Reg v, int64_t n) {
    float all[width];
    store(all, v);
    for (int64_t i = 0; i < n; ++i) p[i] = all[i];
  }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static float sum(Reg v) { return vaddvq_f32(v); }
};

template <>
struct Vec<double> {
  using Reg = float64x2_t;
  static constexpr int width = 2, registers = 32;
  static Reg zero() { return vdupq_n_f64(0); }
  static Reg set(double v) { return vdupq_n_f64(v); }
  static Reg load(const double* p) { return vld1q_f64(p); }
  static Reg load_n(const double* p, int64_t n) { return load(Part<double, width>(p, n).elements); }
  static void store(double* p, Reg v) { vst1q_f64(p, v); }
  static void stream(double* p, Reg v) { store(p, v); }
  static void store_n(double* p, Reg v, int64_t n) {
    double all[width];
    store(all, v);
    for (int64_t i = 0; i < n; ++i) p[i] = all[i];
  }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  static double sum(Reg v) { return vaddvq_f64(v); }
};

// Sums of products in 16 bits, in sixteen parts: element i in part (i / 2) % 16. A Reg is 32 elements, Sums the sixteen
// parts, and sums() adds up the parts of four of them. No part overflows (layer/router_quantise.h).
template <>
struct Vec<int16_t> {
  struct Reg {
    int16x8_t part[4];
  };
  struct Sums {
    int32x4_t part[4];
  };
  static constexpr int width = 32;
  static Sums zero() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static Reg load(const int16_t* p) { return {{vld1q_s16(p), vld1q_s16(p + 8), vld1q_s16(p + 16), vld1q_s16(p + 24)}}; }
  static Sums dot(const Reg& a, const Reg& b, Sums c) {
    for (int i = 0; i < 4; ++i) {
      const int32x4_t low = vmull_s16(vget_low_s16(a.part[i]), vget_low_s16(b.part[i]));
      c.part[i] = vaddq_s32(c.part[i], vpaddq_s32(low, vmull_high_s16(a.part[i], b.part[i])));
    }
    return c;
  }
  static void sums(const Sums& a, const Sums& b, const Sums& c, const Sums& d, float* out) {
    const Sums* const all[4] = {&a, &b, &c, &d};
    for (int k = 0; k < 4; ++k) {
      const float32x4_t low = vaddq_f32(vcvtq_f32_s32(all[k]->part[0]), vcvtq_f32_s32(all[k]->part[1]));
      const float32x4_t high = vaddq_f32(vcvtq_f32_s32(all[k]->part[2]), vcvtq_f32_s32(all[k]->part[3]));
      out[k] = vaddvq_f32(vaddq_f32(low, high));
    }
  }
};

void fence() {}

}  // namespace
}  // namespace fastff
