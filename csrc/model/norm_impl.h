// Kernels of model/norm.h, for the instruction set whose Vec<float> the including file has defined.
#pragma once

#include <cmath>
#include <cstdint>

#include "isa/table.h"
#include "layer/linear.h"
#include "model/norm.h"

// Dot-product and tile instructions add nothing here: their sets run the table of the one they extend.
#if !defined(__AVX512VNNI__)
namespace fastff {
namespace {

inline float sum_of(const float* x, int64_t n) {
  using V = Vec<float>;
  auto total = V::zero();
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) total = V::add(total, V::load(x + i));
  if (i < n) total = V::add(total, V::load_n(x + i, n - i));
  return V::sum(total);
}

void norm_row(const Norm& norm, const float* x, float* y) {
  const int64_t n = norm.features;
  if (norm.centred) {
    const float mean = sum_of(x, n) / static_cast<float>(n);
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] - mean;
    x = y;
  }
  const float scale = 1 / std::sqrt(dot<float, float>(x, x, n) / static_cast<float>(n) + norm.epsilon);
  const float* weight = norm.weight;
  const float* bias = norm.bias;
  if (bias)
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i] + bias[i];
  else
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

void rotate_row(float* __restrict x, const float* __restrict cosine, const float* __restrict sine, int64_t half) {
  float* __restrict upper = x + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = upper[i];
    x[i] = a * cosine[i] - b * sine[i];
    upper[i] = b * cosine[i] + a * sine[i];
  }
}

}  // namespace

const RowKernels FASTFF_TABLE(rows) = {norm_row, rotate_row};

}  // namespace fastff
#endif
