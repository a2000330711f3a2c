#include "model/conditional_load.h"

#include <vector>

#include "base/checks.h"
#include "base/errors.h"

namespace fastff {
namespace {

constexpr int64_t kMostLeaves = 1 << 24, kMostWidth = 1 << 20;

fastff_router read_router(const Json& settings, int64_t hidden) {
  fastff_router router{};
  router.in_features = hidden;
  router.trees = settings.integer("trees", 1, kMostLeaves);
  router.candidates = settings.integer("candidates", 0, kMostLeaves);
  router.chosen = settings.integer("chosen", 1, kMostLeaves);
  router.kind = static_cast<int32_t>(settings.integer("kind", FASTFF_TREES, FASTFF_PRODUCT_KEYS));
  router.depth = static_cast<int32_t>(settings.integer("depth", 0, 24));
  router.gate = static_cast<int32_t>(settings.integer("gate", FASTFF_UNGATED, FASTFF_NORMALISED));
  router.tau = settings.number("tau");
  return router;
}

// Tensors that need not be there have no numbers.
std::vector<float> optional(const WeightsFile& file, const std::string& name, const std::vector<int64_t>& shape) {
  return file.has(name) ? file.widened(name, shape) : std::vector<float>{};
}
const float* pointer(const std::vector<float>& numbers) { return numbers.empty() ? nullptr : numbers.data(); }

}  // namespace

fastff_layer* load_conditional(const WeightsFile& file, const Json& settings, const std::string& prefix, int64_t hidden) {
  const fastff_router router = read_router(settings, hidden);
  fastff_leaves leaves{};
  leaves.in_features = leaves.out_features = hidden;
  leaves.leaves = settings.integer("leaves", 1, kMostLeaves);
  leaves.leaf_width = settings.integer("leaf_width", 1, kMostWidth);
  leaves.activation = static_cast<int32_t>(settings.integer("activation", FASTFF_GELU, FASTFF_ABS));
  const int64_t width = leaves.leaf_width, in_rows = width * (leaves.activation == FASTFF_SWIGLU ? 2 : 1);
  const bool halves = router.kind == FASTFF_PRODUCT_KEYS;
  const int64_t rows = settings.integer("router_rows", 0, kMostLeaves);
  const int64_t balanced = settings.integer("balanced", 0, kMostLeaves);
  const std::string name = prefix + "conditional.";
  const auto w = file.widened(name + "router", {rows, halves ? hidden / 2 : hidden});
  const auto b = optional(file, name + "router.bias", {rows});
  const auto balance = optional(file, name + "balance", {balanced});
  const auto w_in = file.widened(name + "w_in", {leaves.leaves, in_rows, hidden});
  const auto b_in = optional(file, name + "b_in", {leaves.leaves, in_rows});
  const auto w_out = file.widened(name + "w_out", {leaves.leaves, width, hidden});
  const auto b_out = optional(file, name + "b_out", {leaves.leaves, hidden});
  fastff_layer* layer = nullptr;
  const int32_t status = fastff_layer_pack_f32(&router, pointer(w), pointer(b), pointer(balance), &leaves, pointer(w_in),
                                               pointer(b_in), pointer(w_out), pointer(b_out), FASTFF_INT8, &layer);
  if (status != FASTFF_OK) refuse(name + " " + last_error());
  return layer;
}

}  // namespace fastff
