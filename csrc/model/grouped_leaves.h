// A conditional feedforward behind a router whose leaves are matrices with weights in groups of 32 inputs (model/linear.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastff.h"
#include "layer/visits.h"
#include "model/linear.h"
#include "model/weights_file.h"

namespace fastff {

struct FreeRouter {
  void operator()(fastff_packed_router* router) const { fastff_router_free(router); }
};

class GroupedLeaves {
 public:
  // shape: leaf_width is filled up to whole panels, as the weights are. Takes the router. Throws std::invalid_argument.
  GroupedLeaves(const WeightsFile& file, const std::string& name, const fastff_leaves& shape,
                fastff_packed_router* router, int64_t leaves_of_a_row);

  // y [rows][out_features] of rows of x. A row's bits depend neither on the rows beside it nor on the number of threads.
  void run(const float* x, int64_t rows, float* y, int threads) const;

  // Neurons of a leaf with those that fill its panels up.
  static int64_t filled(const fastff_leaves& shape);

 private:
  void run_rows(const float* x, int64_t rows, float* y) const;
  void run_leaf(int64_t leaf, const QuantisedRows& x, const Visits& visits, int64_t begin, int64_t end, const float* gates, float* y) const;
  PackedMatrix part(const PackedMatrix& stack, int64_t leaf, int64_t outputs) const;

  const std::unique_ptr<fastff_packed_router, FreeRouter> router_;
  const fastff_leaves shape_;
  const int64_t width_, leaves_of_a_row_;
  PackedMatrix in_, out_;      // of all leaves, one after another
  std::vector<float> b_in_;    // of pack_bias; empty for none
  Floats b_out_;               // [leaves][out_features]
};

}  // namespace fastff
