// The feedforward of one layer as a weights file has it: dense, conditional, both side by side, or none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "fastff.h"
#include "model/dense.h"
#include "model/experts.h"
#include "model/grouped_leaves.h"
#include "model/weights_file.h"

namespace fastff {

struct FreeConditional {
  void operator()(fastff_layer* layer) const { fastff_layer_free(layer); }
  void operator()(fastff_packed* trees) const { fastff_packed_free(trees); }
};

struct Feedforward {
  Dense up, down;  // of a dense one, or the part of a conditional one that every row passes; may be absent
  int32_t activation = FASTFF_GELU;
  std::unique_ptr<Experts> experts;  // of a conditional one, where they fit; else one of these
  std::unique_ptr<fastff_layer, FreeConditional> routed;
  std::unique_ptr<fastff_packed, FreeConditional> trees;
  std::unique_ptr<GroupedLeaves> grouped;  // routed, with weights in groups
  const float* bias = nullptr;  // [hidden], of a conditional one, or null

  bool conditional() const { return experts || routed || trees || grouped; }
  explicit operator bool() const { return up || conditional() || bias; }
  int64_t neurons() const { return up ? up.matrix.out_features : 0; }

  // Of rows of x what the conditional part gives, without the bias; [rows][hidden]. Not for experts.
  void run_conditional(const float* x, int64_t rows, float* y, int threads) const;
};

// settings: {"neurons", "activation", "gated" where that does not say it, and of a conditional one "trees", "routed" or
// "grouped"}. prefix: of the tensors' names. Throws
// std::invalid_argument for tensors that are missing or do not fit.
// bits: 0, or to which a caller rounds rows who has them for experts too; with 8 one rounding serves `up` and the experts.
Feedforward load_feedforward(const WeightsFile& file, const Json& settings, const std::string& prefix, int64_t hidden,
                             int bits = 0);

// The header's list of them, one for each layer. Throws std::invalid_argument for another number.
const std::vector<Json>& feedforward_settings(const WeightsFile& file, int64_t layers);

}  // namespace fastff
