// A packed router and packed leaves as one layer: rows in, rows out.
#pragma once

#include <cstdint>
#include <memory>

#include "fastff.h"
#include "layer/router_pack.h"

// Opaque to C.
struct fastff_layer {
  // Throws std::invalid_argument where router and leaves do not fit together. Weights come with fill().
  fastff_layer(const fastff::Router& router, const fastff_leaves& leaves, int32_t weights);

  // w_in and what follows it: of the leaves. Every array is copied.
  void fill(const float* w, const float* b, const float* balance, const float* w_in, const float* b_in,
            const float* w_out, const float* b_out);

  // y of all rows; route: where the leaves, gates and (if not null) scores of all rows go. The caller has checked that the
  // arrays are there. Nothing is allocated once the calling thread has seen as many rows.
  void forward(const float* x, int64_t rows, const fastff::Chosen<float>& route, float* y, int threads) const;

  const fastff::Router& router() const { return router_->router; }
  int64_t out_features() const { return leaves_.out_features; }
  int64_t bytes() const;

 private:
  struct Free {
    void operator()(fastff_packed_leaves* leaves) const { fastff_conditional_packed_free(leaves); }
  };

  fastff_leaves leaves_;
  int32_t weights_;
  std::unique_ptr<fastff_packed_router> router_;
  std::unique_ptr<fastff_packed_leaves, Free> packed_;
};
