// Wide leaves by matrix tiles: the rows that chose a leaf are multiplied with it together.
//
// A leaf is neurons with SwiGLU, GELU or ReLU, filled up to whole blocks, or to a multiple of 64 where there are more. Its
// weights in 8 bits lie as tiles of 16 outputs and 64 inputs, [16 words of 4 inputs][16 outputs][4], in the order in which
// they are read. The scale of an output neuron is part of the factors that it is multiplied by, which are rounded to 8 bits with
// one scale for each row and leaf. A row's result is the same bits alone and in any batch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/dispatch.h"
#include "base/huge_pages.h"
#include "layer/router_pack.h"
#include "layer/visits.h"
#include "model/linear.h"
#include "model/weights_file.h"

namespace fastff {

// A router and the leaves behind it as a weights file has them; what is not there has no numbers.
struct RoutedWeights {
  fastff_router router;
  fastff_leaves leaves;
  Floats rows, bias, balance;  // of the router
  Floats w_in, b_in, w_out, b_out;
};

constexpr int64_t kTileOutputs = 16, kTileInputs = 64, kBlockRows = 2 * kTileOutputs;

struct ExpertShape {
  int64_t hidden, leaves, width;
  int32_t activation;
  int64_t neurons;  // of a leaf, with padding
  int64_t depth;    // of them that one tile of w_out sums over

  explicit ExpertShape(const fastff_leaves& leaves);
  bool gated() const { return activation == FASTFF_SWIGLU; }
  int64_t in_rows() const { return neurons * (gated() ? 2 : 1); }  // of w_in of a leaf
  int64_t blocks() const { return in_rows() / kBlockRows; }        // of 16 gates and their 16 values, or of 32 neurons
  int64_t in_bytes() const { return in_rows() * hidden; }          // of a leaf
  int64_t out_bytes() const { return neurons * hidden; }
  // Where in its leaf's blocks the row of w_in lies that is a neuron's gate or only row (0) or its value (1).
  int64_t in_row(int64_t neuron, int64_t value) const {
    return gated() ? neuron / kTileOutputs * kBlockRows + value * kTileOutputs + neuron % kTileOutputs : neuron;
  }
};

// Rows from `begin` to `end` of the sorted visits, which chose one leaf.
struct ExpertGroup {
  int64_t leaf, begin, end;
};

struct ExpertCall {
  const ExpertShape& shape;
  const int8_t *in, *out;              // weights
  const float *scale_in, *scale_out;   // [leaves][blocks][32]; [leaves][neurons]
  const float *b_in, *b_out;           // [leaves][blocks][32]; [leaves][hidden], or null
  const QuantisedRows& x;              // in 8 bits
  Visits visits;
  const ExpertGroup* groups;
  int64_t group_count;
  const float* gate;  // of each item
  int8_t* factors;    // [positions][neurons]
  float* scale;       // [positions], of the factors
  float* y;           // [rows][hidden], added to
};

struct ExpertKernels {
  void (*neurons)(const ExpertCall&, int64_t begin, int64_t end);  // groups: fill factors and scale
  void (*outputs)(const ExpertCall&, int64_t begin, int64_t end);  // tiles of 16 columns of y
};

// Null where the instruction set has no tiles.
const ExpertKernels* expert_kernels();

class Experts {
 public:
  // Whether this CPU and such a layer gain from it.
  static bool fit(const RoutedWeights& weights);
  // factors: [hidden], what the channels of x are multiplied by before they are rounded, or null.
  Experts(const RoutedWeights& weights, const float* factors);

  // Adds to y [rows][hidden]. numbers: the rows of x in 8 bits. x may be y.
  void add(const float* x, const QuantisedRows& numbers, float* y, int threads) const;

 private:
  // One row of the weights, with its scale and bias, to where the kernels read them.
  void fill_in(const RoutedWeights& weights, const float* factors, int64_t leaf, int64_t neuron, int64_t value);
  void fill_out(const RoutedWeights& weights, int64_t leaf, int64_t neuron);

  const ExpertKernels* const kernels_;
  const ExpertShape shape_;
  std::unique_ptr<fastff_packed_router> router_;
  HugeBuffer in_, out_;
  std::vector<float> scale_in_, scale_out_, b_in_, b_out_;  // b_in_: zeros where there are no biases; b_out_: empty then
};

}  // namespace fastff
