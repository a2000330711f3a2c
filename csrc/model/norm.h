// Work on single rows between products: norms, and rotation by position.
#pragma once

#include <cstdint>

#include "base/dispatch.h"

namespace fastff {

// LayerNorm where `centred`, else RMSNorm.
struct Norm {
  int64_t features = 0;
  float epsilon = 0;
  bool centred = false;
  const float* weight = nullptr;
  const float* bias = nullptr;  // or null
};

struct RowKernels {
  // y may be x.
  void (*norm)(const Norm& norm, const float* x, float* y);
  // Pairs (x[i], x[half + i]) by the angles whose cosines and sines are given: [half] each.
  void (*rotate)(float* x, const float* cosine, const float* sine, int64_t half);
};

FASTFF_DECLARE_TABLES(RowKernels, rows);
inline const RowKernels& row_kernels() { return FASTFF_CHOSEN_TABLE(RowKernels, rows); }

}  // namespace fastff
