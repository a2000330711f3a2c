// What quantised weights add to a forward: decisions as the fp32 layer takes them, and scales.
//
// |<x, w> - <x, stored w>| is at most ||x|| * ||w - stored w|| (Cauchy and Schwarz). A score within that bound, plus
// rounding, is computed again: first with what rounding left of the row, a second row, of int8, and where that is not enough
// from the fp32 row, in the order in which the fp32 layer sums it. So are scores where a sum in fp32 could overflow or lose
// itself among subnormal numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "layer/kernels.h"
#include "layer/linear.h"
#include "layer/path.h"
#include "layer/store.h"

namespace fastff {
namespace {

constexpr float kSmallestScore = 1e-30f;  // far above what flushed subnormal products can add up to

// ||x||, or infinity if that is above kLargestNorm: no sign is certain then.
inline float norm(const float* x, int64_t n) {
  const float squares = dot(x, x, n);
  if (squares > 1e-30f && squares < kLargestNorm * kLargestNorm) return std::sqrt(squares);
  double wide = 0;  // fp32 squares overflow or vanish
  for (int64_t i = 0; i < n; ++i) wide += static_cast<double>(x[i]) * x[i];
  const double length = std::sqrt(wide);
  return length < kLargestNorm ? static_cast<float>(length) : INFINITY;
}

// Whether the fp32 layer is sure to see this sign. x_norm: ||x||. False for NaN anywhere.
inline bool sign_is_certain(float score, float x_norm, const Neuron& neuron) {
  return std::fabs(score) > x_norm * neuron.error + kSmallestScore;
}

// A leaf neuron's product with x in units of its weights. The sum over stored weights can overflow where that over the
// weights meant does not.
template <class W>
float scaled_product(float product, const Neuron& neuron, const float* x, const W* stored, int64_t n) {
  if (std::isfinite(product)) return product * neuron.scale_in;
  double wide = 0;
  for (int64_t i = 0; i < n; ++i) wide += static_cast<double>(x[i]) * to_float(stored[i]);
  return static_cast<float>(wide * neuron.scale_in);
}

// Scales of the output rows of a path through `leaf`.
template <class W>
void output_scales(const Tree& tree, const View<float, W>& view, int64_t leaf, float* scale) {
  if (tree.node_output)
    for (int level = 0; level < tree.depth; ++level)
      *scale++ = view.neuron(view.in_row(ancestor(tree, leaf, level))).scale_out;
  for (int64_t j = 0; j < tree.leaf_width; ++j) *scale++ = view.neuron(view.leaf_in_row(leaf, j)).scale_out;
}

}  // namespace
}  // namespace fastff
