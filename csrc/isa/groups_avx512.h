// Products of lines of 4-bit weights and of groups with scales of their own (groups_plain.h), beside words_avx512.h.
#pragma once

#include <immintrin.h>

#include "base/half.h"
#include "isa/words_avx512.h"

namespace fastff {
namespace {

struct Groups {
  using B = Words<int8_t>;
  using Floats = __m512;

  static Floats zero() { return _mm512_setzero_ps(); }
  static B::Line lower(B::Line line) { return _mm512_and_si512(line, _mm512_set1_epi8(15)); }
  static B::Line upper(B::Line line) { return _mm512_and_si512(_mm512_srli_epi16(line, 4), _mm512_set1_epi8(15)); }
  static B::Acc all(int32_t value) { return _mm512_set1_epi32(value); }
  static Floats scaled(Floats f, B::Acc sums, const Half* scales, int) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), wide(scales), f);
  }
  static Floats added(Floats f, float x, const Half* scales, int) {
    return _mm512_fmadd_ps(_mm512_set1_ps(x), wide(scales), f);
  }
  static void store(float* to, Floats f, int) { _mm512_storeu_ps(to, f); }

 private:
  static __m512 wide(const Half* scales) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
  }
};

}  // namespace
}  // namespace fastff
