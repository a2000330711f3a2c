// A packed matrix with the bias that goes with it, as a weights file has them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/linear.h"
#include "model/weights_file.h"

namespace fastff {

struct Dense {
  PackedMatrix matrix;
  std::vector<float> bias;         // of pack_bias; empty for none
  const float* factors = nullptr;  // [in_features], of the channels of x before they are rounded; null for none

  explicit operator bool() const { return matrix.data != nullptr; }

  Epilogue epilogue(int activation = FASTFF_IDENTITY, bool add = false) const {
    return {bias.empty() ? nullptr : bias.data(), activation, add};
  }
};

// The tensors `name` and, where they are, `name`.bias and `name`.factors. Throws std::invalid_argument.
Dense load_dense(const WeightsFile& file, const std::string& name, int64_t out_features, int64_t in_features,
                 bool gated = false);

}  // namespace fastff
