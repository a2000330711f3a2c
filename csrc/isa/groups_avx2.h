// Products of lines of 4-bit weights and of groups with scales of their own (groups_plain.h), beside words_avx2.h.
#pragma once

#include <immintrin.h>

#include "base/half.h"
#include "isa/words_avx2.h"

namespace fastff {
namespace {

struct Groups {
  using B = Words<int8_t>;
  using Floats = __m256;

  static Floats zero() { return _mm256_setzero_ps(); }
  static B::Line lower(B::Line line) { return _mm256_and_si256(line, _mm256_set1_epi8(15)); }
  static B::Line upper(B::Line line) { return _mm256_and_si256(_mm256_srli_epi16(line, 4), _mm256_set1_epi8(15)); }
  static B::Acc all(int32_t value) { return _mm256_set1_epi32(value); }
  static Floats scaled(Floats f, B::Acc sums, const Half* scales, int part) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), wide(scales, part), f);
  }
  static Floats added(Floats f, float x, const Half* scales, int part) {
    return _mm256_fmadd_ps(_mm256_set1_ps(x), wide(scales, part), f);
  }
  static void store(float* to, Floats f, int part) { _mm256_storeu_ps(to + 8 * part, f); }

 private:
  static __m256 wide(const Half* scales, int part) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 8 * part)));
  }
};

}  // namespace
}  // namespace fastff
