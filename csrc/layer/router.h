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

// Beside the rows of a router in 16 bits lie, where the CPU has matrix tiles, those that most rows of x are multiplied with
// as tiles take them: panels of sixteen rows, of each 64 features a tile of upper bytes and one of lower bytes. A panel's
// rows are of one group: a tree's nodes, of a greedy tree those of its first levels, or a codebook.
constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int kTiledLevels = 6;                        // of a greedy tree
constexpr int64_t kMostTiledFeatures = int64_t{1} << 15;  // whose sums of bytes' products fit 32 bits

inline int64_t tile_steps(int64_t features) { return (features + 63) / 64; }
// Where a tile keeps feature i of its 64: the order in which rows of x in 16 bits fall apart into bytes.
inline int64_t tile_place(int64_t i) { return i % 32 / 8 * 16 + i / 32 * 8 + i % 8; }

struct TiledWeights {
  int64_t groups, group_rows, tiled_rows;  // of a group's rows of weights the first tiled_rows
  int64_t panels() const { return (tiled_rows + kTileRows - 1) / kTileRows; }  // of a group
};
inline TiledWeights tiled_weights(const Router& r) {
  if (!r.is_trees()) return {r.halves(), r.candidates, r.candidates};
  const int levels = r.kind == FASTFF_TREES && r.depth > kTiledLevels ? kTiledLevels : r.depth;
  return {r.trees, r.nodes(), (int64_t{1} << levels) - 1};
}

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

  const char* tiles;  // quantised; or null

  const W* at(int64_t i) const { return w + i * stride; }
  // The panels of a group.
  const char* panel(const Router& router, int64_t group) const {
    return tiles + group * tiled_weights(router).panels() * tile_steps(stride) * 2 * kTileBytes;
  }
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
FASTFF_DECLARE_TILE_TABLES(RouterKernels, router_kernels);

inline const RouterKernels& router_kernels() { return FASTFF_CHOSEN_TILE_TABLE(RouterKernels, router_kernels); }

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
