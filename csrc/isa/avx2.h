// AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "base/bf16.h"
#include "base/half.h"

namespace fastff {
namespace {

template <class T>
struct Vec;

alignas(64) constexpr int32_t kMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(64) constexpr int64_t kMask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};

template <>
struct Vec<float> {
  using Reg = __m256;
  static constexpr int width = 8, registers = 16;
  static __m256i first(int64_t n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask32 + 8 - n)); }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set(float v) { return _mm256_set1_ps(v); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static Reg load(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Reg load_n(const Bf16* p, int64_t) { return load(p); }
  static Reg load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Reg load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Reg load_n(const int8_t* p, int64_t) { return load(p); }
  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static void store(Half* p, Reg v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0)); }
  static void stream(float* p, Reg v) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof v == 0) _mm256_stream_ps(p, v);
    else store(p, v);
  }
  static void store_n(float* p, Reg v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static float sum(Reg v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

template <>
struct Vec<double> {
  using Reg = __m256d;
  static constexpr int width = 4, registers = 16;
  static __m256i first(int64_t n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask64 + 4 - n)); }
  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg set(double v) { return _mm256_set1_pd(v); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static Reg load_n(const double* p, int64_t n) { return _mm256_maskload_pd(p, first(n)); }
  static void store(double* p, Reg v) { _mm256_storeu_pd(p, v); }
  static void stream(double* p, Reg v) { store(p, v); }
  static void store_n(double* p, Reg v, int64_t n) { _mm256_maskstore_pd(p, first(n), v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static double sum(Reg v) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

// Sums of products in 16 bits, in sixteen parts: element i in part (i / 2) % 16. A Reg is 32 elements, Sums the sixteen
// parts, and sums() adds up the parts of four of them. No part overflows (layer/router_quantise.h).
template <>
struct Vec<int16_t> {
  struct Reg {
    __m256i low, high;
  };
  using Sums = Reg;
  static constexpr int width = 32;
  static Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Reg load(const int16_t* p) {
    const auto* at = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  static Sums dot(Reg a, Reg b, Sums c) {
    return {_mm256_add_epi32(c.low, _mm256_madd_epi16(a.low, b.low)),
            _mm256_add_epi32(c.high, _mm256_madd_epi16(a.high, b.high))};
  }
  static void sums(Sums a, Sums b, Sums c, Sums d, float* out) {
    const __m256 wx = _mm256_hadd_ps(halves(a), halves(b)), yz = _mm256_hadd_ps(halves(c), halves(d));
    const __m256 all = _mm256_hadd_ps(wx, yz);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  static __m256 halves(Sums a) { return _mm256_add_ps(_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)); }
};

void fence() { _mm_sfence(); }

}  // namespace
}  // namespace fastff
