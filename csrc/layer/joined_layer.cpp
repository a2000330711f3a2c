#include "layer/joined_layer.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/checks.h"
#include "base/errors.h"

using namespace fastff;

namespace fastff {
namespace {

constexpr int64_t kMostRows = 2048;  // routed before their leaves are computed: what they chose stays in the cache

// Throws what a C function's status stands for.
void need_ok(int32_t status) {
  if (status == FASTFF_OK) return;
  if (status == FASTFF_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status == FASTFF_BAD_ARGUMENT) throw std::invalid_argument(std::string(last_error()));
  throw std::runtime_error(std::string(last_error()));
}

// Where the leaves and gates of a call go that nobody asked for, kept by a thread between calls.
struct Route {
  std::vector<int64_t> leaf;
  std::vector<float> gate;

  static Route& local() {
    static thread_local Route route;
    return route;
  }
};

}  // namespace
}  // namespace fastff

fastff_layer::fastff_layer(const Router& router, const fastff_leaves& leaves, int32_t weights)
    : leaves_(leaves), weights_(weights), router_(make_router_pack(router, weights)) {
  if (leaves.leaves != router.leaves())
    refuse("leaves " + std::to_string(leaves.leaves) + " does not match the router's " + std::to_string(router.leaves()));
  if (leaves.in_features != router.in_features)
    refuse("in_features " + std::to_string(leaves.in_features) + " of the leaves does not match the router's " +
           std::to_string(router.in_features));
}

void fastff_layer::fill(const float* w, const float* b, const float* balance, const float* w_in, const float* b_in,
                        const float* w_out, const float* b_out) {
  fastff_packed_leaves* fresh = nullptr;
  need_ok(fastff_conditional_pack_f32(&leaves_, w_in, b_in, w_out, b_out, weights_, &fresh));
  packed_.reset(fresh);
  router_->fill(w, b, balance);
}

void fastff_layer::forward(const float* x, int64_t rows, const Chosen<float>& route, float* y, int threads) const {
  const int64_t k = router().per_row(), in = router().in_features;
  for (int64_t at = 0; at < rows; at += kMostRows) {
    const int64_t n = std::min(kMostRows, rows - at);
    const Chosen<float> part = {route.leaf + at * k, route.gate + at * k,
                                route.scores ? route.scores + at * router().row_scores() : nullptr};
    router_->route(x + at * in, n, part, threads);
    need_ok(fastff_conditional_infer_f32(packed_.get(), x + at * in, part.leaf, part.gate, n, k, y + at * out_features(),
                                         threads));
  }
}

int64_t fastff_layer::bytes() const { return router_->bytes() + fastff_conditional_packed_bytes(packed_.get()); }

extern "C" {

int32_t fastff_layer_pack_f32(const fastff_router* given, const float* w, const float* b, const float* balance,
                              const fastff_leaves* leaves, const float* w_in, const float* b_in, const float* w_out,
                              const float* b_out, int32_t weights, fastff_layer** layer) {
  return guarded([&] {
    need(layer != nullptr, "layer must not be NULL");
    need(leaves != nullptr, "leaves must not be NULL");
    const Router router = checked(given);
    need_router_weights(router, w, b, balance);
    auto fresh = std::make_unique<fastff_layer>(router, *leaves, weights);
    fresh->fill(w, b, balance, w_in, b_in, w_out, b_out);
    *layer = fresh.release();
  });
}

int32_t fastff_layer_infer_f32(const fastff_layer* layer, const float* x, float* y, int64_t rows, int32_t threads) {
  return guarded([&] {
    need(layer != nullptr, "layer must not be NULL");
    const Router& router = layer->router();
    Route& route = Route::local();
    need_rows(router, rows);
    if (rows == 0) return;
    need(x && y, "x and y must not be NULL");
    const Array in = array("x", x, rows * router.in_features), out = array("y", y, rows * layer->out_features());
    need_aligned({in, out});
    need_disjoint({out}, {in});
    const int64_t block = std::min(rows, kMostRows);
    if (static_cast<int64_t>(route.leaf.size()) < block * router.per_row()) {
      route.leaf.resize(block * router.per_row());
      route.gate.resize(block * router.per_row());
    }
    for (int64_t at = 0; at < rows; at += block)
      layer->forward(x + at * router.in_features, std::min(block, rows - at), {route.leaf.data(), route.gate.data(), nullptr},
                     y + at * layer->out_features(), threads);
  });
}

int64_t fastff_layer_bytes(const fastff_layer* layer) { return layer ? layer->bytes() : 0; }

void fastff_layer_free(fastff_layer* layer) { delete layer; }

}  // extern "C"
