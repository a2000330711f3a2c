// Sixteen numbers to bfloat16, by one instruction where the including file is compiled for it.
#pragma once

#include <cstdint>

#include "base/bf16.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fastff {
namespace {

inline void to_bf16_lanes(const float* x, uint16_t* to) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x))));
#else
  for (int i = 0; i < 16; ++i) to[i] = to_bf16(x[i]);
#endif
}

}  // namespace
}  // namespace fastff
