#include "model/dense.h"

namespace fastff {

Dense load_dense(const WeightsFile& file, const std::string& name, int64_t out_features, int64_t in_features,
                 bool gated) {
  Dense result{file.matrix(name, out_features, in_features, gated), {}};
  if (file.has(name + ".factors")) result.factors = file.numbers(name + ".factors", {in_features});
  if (!file.has(name + ".bias")) return result;
  const float* bias = file.numbers(name + ".bias", {out_features * (gated ? 2 : 1)});
  result.bias.resize(result.matrix.panels() * kPanel);
  pack_bias(result.matrix, bias, result.bias.data());
  return result;
}

}  // namespace fastff
