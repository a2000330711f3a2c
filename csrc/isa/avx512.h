// AVX-512 (F, VL, BW, DQ) with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "base/bf16.h"
#include "base/half.h"

namespace fastff {
namespace {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using Reg = __m512;
  static constexpr int width = 16, registers = 32;
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set(float v) { return _mm512_set1_ps(v); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static Reg load(const Bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Reg load_n(const Bf16* p, int64_t) { return load(p); }
  static Reg load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Reg load_n(const int8_t* p, int64_t) { return load(p); }
  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static void store(Half* p, Reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0)); }
  static void stream(float* p, Reg v) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof v == 0) _mm512_stream_ps(p, v);
    else store(p, v);
  }
  static void store_n(float* p, Reg v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static float sum(Reg v) { return _mm512_reduce_add_ps(v); }
};

template <>
struct Vec<double> {
  using Reg = __m512d;
  static constexpr int width = 8, registers = 32;
  static __mmask8 first(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg set(double v) { return _mm512_set1_pd(v); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static Reg load_n(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static void store(double* p, Reg v) { _mm512_storeu_pd(p, v); }
  static void stream(double* p, Reg v) { store(p, v); }
  static void store_n(double* p, Reg v, int64_t n) { _mm512_mask_storeu_pd(p, first(n), v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static double sum(Reg v) { return _mm512_reduce_add_pd(v); }
};

// Sums of products in 16 bits, in sixteen parts: element i in part (i / 2) % 16. A Reg is 32 elements, Sums the sixteen
// parts, and sums() adds up the parts of four of them. No part overflows (layer/router_quantise.h).
template <>
struct Vec<int16_t> {
  using Reg = __m512i;
  using Sums = __m512i;
  static constexpr int width = 32;
  static Sums zero() { return _mm512_setzero_si512(); }
  static Reg load(const int16_t* p) { return _mm512_loadu_si512(p); }
  static Sums dot(Reg a, Reg b, Sums c) {
#ifdef __AVX512VNNI__
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));  // the intrinsic makes GCC 12 copy every sum twice a step
    return c;
#else
    return _mm512_add_epi32(c, _mm512_madd_epi16(a, b));
#endif
  }
  // The totals of the parts. Beside matrix tiles, whose sums are exact, they are exact and rounded once.
#ifdef __AMX_INT8__
  static void sums(Sums a, Sums b, Sums c, Sums d, float* out) {
    const __m512i low = _mm512_set1_epi32(65535);
    const __m128i upper = totals(_mm512_srai_epi32(a, 16), _mm512_srai_epi32(b, 16), _mm512_srai_epi32(c, 16), _mm512_srai_epi32(d, 16));
    const __m128i lower = totals(_mm512_and_si512(a, low), _mm512_and_si512(b, low), _mm512_and_si512(c, low), _mm512_and_si512(d, low));
    _mm_storeu_ps(out, _mm_fmadd_ps(_mm_cvtepi32_ps(upper), _mm_set1_ps(65536.0f), _mm_cvtepi32_ps(lower)));
  }

 private:
  static __m128i totals(Sums w, Sums x, Sums y, Sums z) {
    const __m512i wx = _mm512_add_epi32(_mm512_unpacklo_epi32(w, x), _mm512_unpackhi_epi32(w, x));
    const __m512i yz = _mm512_add_epi32(_mm512_unpacklo_epi32(y, z), _mm512_unpackhi_epi32(y, z));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(wx, yz), _mm512_unpackhi_epi64(wx, yz));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
#else
  static void sums(Sums a, Sums b, Sums c, Sums d, float* out) {
    const __m512 w = _mm512_cvtepi32_ps(a), x = _mm512_cvtepi32_ps(b);
    const __m512 y = _mm512_cvtepi32_ps(c), z = _mm512_cvtepi32_ps(d);
    const __m512 wx = _mm512_add_ps(_mm512_unpacklo_ps(w, x), _mm512_unpackhi_ps(w, x));
    const __m512 yz = _mm512_add_ps(_mm512_unpacklo_ps(y, z), _mm512_unpackhi_ps(y, z));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(wx, yz, 0x44), _mm512_shuffle_ps(wx, yz, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
#endif
};

[[maybe_unused]] void fence() { _mm_sfence(); }

}  // namespace
}  // namespace fastff
