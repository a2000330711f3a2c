// Routers: which leaves a row goes to, and with what gate. Sizes, views of weights, and the family of kernels.
#pragma once

#include <cstdint>

#include "base/checks.h"
#include "base/dispatch.h"
#include "fastff.h"

namespace fastff {

// A checked fastff_router with its derived sizes.
struct Router {
  int64_t in_features, trees, candidates, chosen;
  int kind, depth, gate;
  double tau;

  bool is_trees() const { return kind == FASTFF_TREES || kind == FASTFF_PATHS; }
  int64_t nodes() const { return (int64_t{1} << depth) - 1; }  // of one tree
  int64_t tree_leaves() const { return int64_t{1} << depth; }
  int64_t leaves() const {
    if (is_trees()) return trees * tree_leaves();
    return kind == FASTFF_FLAT ? candidates : candidates * candidates;
  }
  int64_t per_row() const { return trees * chosen; }  // leaves of a row
  int64_t row_scores() const { return kind == FASTFF_TREES ? trees * depth : per_row(); }
  int64_t weight_rows() const {
    if (is_trees()) return trees * nodes();
    return kind == FASTFF_FLAT ? candidates : 2 * candidates;
  }
  int64_t halves() const { return kind == FASTFF_PRODUCT_KEYS ? 2 : 1; }  // equal parts of a row of x
  int64_t weight_features() const { return in_features / halves(); }
  int64_t balances() const {  // elements of `balance`; 0: there is none
    if (kind == FASTFF_TREES) return 0;
    return kind == FASTFF_PATHS ? trees * (nodes() + tree_leaves()) : leaves();
  }
};

// Routing weights: T itself, or int16_t beside the fp32 rows that decide where 16 bits cannot.
template <class T, class W = T>
struct RouterView {
  const W* w;
  int64_t stride;        // elements from row to row
  const T* b;            // [weight_rows] or null
  const T* balance;      // [balances] or null
  const T* exact;        // quantised: [weight_rows][weight_features]

  // Quantised, [weight_rows]. A stored weight times its scale is the weight meant. A score's distance from its fp32 score
  // is at most ||x|| * error + ||x - stored x|| * reach.
  const float *scale, *error, *reach;

  const W* at(int64_t i) const { return w + i * stride; }
};

// Outputs of a route; scores may be null.
template <class T>
struct Chosen {
  int64_t* leaf;
  T* gate;
  T* scores;
};

// Rows [row, row_end) of x and of every output; of trees [tree, tree_end) only.
struct RoutePiece {
  int64_t row, row_end, tree, tree_end;
};

template <class T, class W = T>
using RouteKernel = void (*)(const Router&, const RouterView<T, W>&, const T* x, const RoutePiece&, const Chosen<T>&);

// The family of kernels of one instruction set (base/dispatch.h).
struct RouterKernels {
  RouteKernel<float> f32;
  RouteKernel<double> f64;
  RouteKernel<float, int16_t> i16;
};
FASTFF_DECLARE_DOT_TABLES(RouterKernels, router_kernels);

inline const RouterKernels& router_kernels() { return FASTFF_CHOSEN_DOT_TABLE(RouterKernels, router_kernels); }

// Throws std::invalid_argument naming the value seen and the one expected.
Router checked(const fastff_router* router);
template <class T>
void need_router_weights(const Router& router, const T* w, const T* b, const T* balance);

void need_rows(const Router& router, int64_t rows);

// Of rows and outputs; weights: what the outputs must not overlap besides x.
template <class T>
void check_route(const Router& router, const T* x, int64_t rows, const Chosen<T>& out, Arrays weights);

// Routes all rows, split over threads. The caller has checked everything.
template <class T, class W>
void route_rows(RouteKernel<T, W> kernel, const Router& router, const RouterView<T, W>& view, const T* x, int64_t rows,
                const Chosen<T>& out, int threads);

}  // namespace fastff
