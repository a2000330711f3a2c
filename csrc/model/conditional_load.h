// The conditional feedforward of a layer, packed from a weights file.
#pragma once

#include <cstdint>
#include <string>

#include "fastff.h"
#include "model/weights_file.h"

namespace fastff {

// settings: "conditional" of the header, one for all layers. prefix: of the tensors' names. The caller frees the layer.
fastff_layer* load_conditional(const WeightsFile& file, const Json& settings, const std::string& prefix, int64_t hidden);

}  // namespace fastff
