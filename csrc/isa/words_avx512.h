// Products of 64-byte lines of weights (words_plain.h) for AVX-512, by VNNI and BF16 where the file is compiled for them.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "base/bf16.h"

namespace fastff {
namespace {

template <class W>
using Sum = std::conditional_t<sizeof(W) == 1, int32_t, float>;

template <class W>
struct Words {
  using Line = __m512i;
  using Acc = __m512i;
  static constexpr int parts = 1, tile = 8, columns = 12;
  static constexpr int chains = sizeof(W) == 1 ? 1 : 2;

  static Acc zero() { return _mm512_setzero_si512(); }
  static Line load(const char* p, int) { return _mm512_loadu_si512(p); }
  static Line word(const char* p) {
    int32_t one;
    __builtin_memcpy(&one, p, sizeof one);
    return _mm512_set1_epi32(one);
  }
  static Line pair(const char* p) {
    int64_t two;
    __builtin_memcpy(&two, p, sizeof two);
    return _mm512_set1_epi64(two);
  }
  static Acc dot(Acc acc, Line w, Line x) {
    if constexpr (sizeof(W) == 4) {
      return fma(w, x, acc);
    } else if constexpr (sizeof(W) == 2) {
#ifdef __AVX512BF16__
      return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(acc), reinterpret_cast<__m512bh>(w),
                                                  reinterpret_cast<__m512bh>(x)));
#else
      const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
      acc = fma(_mm512_slli_epi32(w, 16), _mm512_slli_epi32(x, 16), acc);
      return fma(_mm512_and_si512(w, high), _mm512_and_si512(x, high), acc);
#endif
    } else {
#ifdef __AVX512VNNI__
      return _mm512_dpbusd_epi32(acc, w, x);
#else  // vpmaddubsw would saturate
      const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)),
                                             _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
      const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
      return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
#endif
    }
  }
  static Acc add(Acc a, Acc b) {
    if constexpr (sizeof(W) == 1) return _mm512_add_epi32(a, b);
    else return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
  static Acc join(Acc high, Acc low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
  static void store(Sum<W>* to, Acc acc, int) { _mm512_storeu_si512(to, acc); }
  static void store_pairs(Sum<W>* to, Acc acc, int) {
    const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const Acc sums = add(_mm512_permutexvar_epi32(even, acc), _mm512_permutexvar_epi32(odd, acc));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(sums));
  }
  static Acc load_sums(const Sum<W>* p, int) { return _mm512_loadu_si512(p); }

 private:
  static Acc fma(__m512i a, __m512i b, __m512i c) {
    return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(c)));
  }
};

}  // namespace
}  // namespace fastff
