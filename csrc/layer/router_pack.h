// A copy of a router's weights laid out for inference.
#pragma once

#include <memory>

#include "layer/router.h"

struct fastff_packed_router {
  explicit fastff_packed_router(const fastff::Router& r) : router(r) {}
  virtual ~fastff_packed_router() = default;
  fastff_packed_router(const fastff_packed_router&) = delete;
  fastff_packed_router& operator=(const fastff_packed_router&) = delete;

  virtual void fill(const float* w, const float* b, const float* balance) = 0;
  // Rows are checked; nothing is allocated once every thread has seen as many rows.
  virtual void route(const float* x, int64_t rows, const fastff::Chosen<float>& out, int threads) const = 0;
  virtual int64_t bytes() const = 0;

  const fastff::Router router;
};

namespace fastff {

// weights: enum fastff_weights. Throws std::invalid_argument if it is none.
std::unique_ptr<fastff_packed_router> make_router_pack(const Router& router, int32_t weights);

}  // namespace fastff
