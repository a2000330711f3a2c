// Products of 64-byte lines of weights (words_plain.h) for AVX2.
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
  using Line = __m256i;
  using Acc = __m256i;
  static constexpr int parts = 2, columns = 3;
  static constexpr int chains = sizeof(W) == 1 ? 1 : 2, tile = sizeof(W) == 1 ? 4 : 2;

  static Acc zero() { return _mm256_setzero_si256(); }
  static Line load(const char* p, int part) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * part));
  }
  static Line word(const char* p) {
    int32_t one;
    __builtin_memcpy(&one, p, sizeof one);
    return _mm256_set1_epi32(one);
  }
  static Line pair(const char* p) {
    int64_t two;
    __builtin_memcpy(&two, p, sizeof two);
    return _mm256_set1_epi64x(two);
  }
  static Acc dot(Acc acc, Line w, Line x) {
    if constexpr (sizeof(W) == 4) {
      return fma(w, x, acc);
    } else if constexpr (sizeof(W) == 2) {
      const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
      acc = fma(_mm256_slli_epi32(w, 16), _mm256_slli_epi32(x, 16), acc);
      return fma(_mm256_and_si256(w, high), _mm256_and_si256(x, high), acc);
    } else {  // vpmaddubsw would saturate
      const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                             _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
      const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
      return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
    }
  }
  static Acc add(Acc a, Acc b) {
    if constexpr (sizeof(W) == 1) return _mm256_add_epi32(a, b);
    else return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
  }
  static Acc join(Acc high, Acc low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
  static void store(Sum<W>* to, Acc acc, int part) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * part), acc); }
  static void store_pairs(Sum<W>* to, Acc acc, int part) {
    Sum<W> lane[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), acc);
    for (int i = 0; i < 4; ++i) to[4 * part + i] = lane[2 * i] + lane[2 * i + 1];
  }
  static Acc load_sums(const Sum<W>* p, int part) { return load(reinterpret_cast<const char*>(p), part); }

 private:
  static Acc fma(__m256i a, __m256i b, __m256i c) {
    return _mm256_castps_si256(_mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(c)));
  }
};

}  // namespace
}  // namespace fastff
