// Routers at the C boundary: checks, and the split of one call's work over threads.
#include "layer/router.h"

#include <algorithm>
#include <cmath>

#include "base/checks.h"
#include "base/errors.h"
#include "base/threads.h"

namespace fastff {
namespace {

constexpr int64_t kRowsAPiece = 4;    // fewer rows are not worth a second thread
constexpr int64_t kPathsAPiece = 16;  // nor are fewer paths, one a row and tree

void check_choice(const fastff_router& r) {
  if (r.kind == FASTFF_TREES || r.kind == FASTFF_PATHS) {
    need_in("trees", r.trees, 1, kMaxSize);
    need_in("depth", r.depth, 0, 24);
    need_in("candidates", r.candidates, 0, 0);
    need_in("chosen", r.chosen, 1, r.kind == FASTFF_TREES ? 1 : int64_t{1} << r.depth);
    return;
  }
  need_in("trees", r.trees, 1, 1);
  need_in("depth", r.depth, 0, 0);
  need_in("candidates", r.candidates, 1, r.kind == FASTFF_FLAT ? (int64_t{1} << 31) - 1 : 46340);  // leaves below 2^31
  need_in("chosen", r.chosen, 1, r.kind == FASTFF_FLAT ? r.candidates : r.candidates * r.candidates);
  if (r.kind == FASTFF_PRODUCT_KEYS && r.in_features % 2)
    refuse("in_features " + std::to_string(r.in_features) + " is not even, which product keys need");
}

void check_gate(const fastff_router& r) {
  if (r.kind == FASTFF_TREES) need_in("gate", r.gate, FASTFF_UNGATED, FASTFF_BOUNDARY_MIN);
  else if (r.gate != FASTFF_UNGATED && r.gate != FASTFF_NORMALISED)
    refuse("gate " + std::to_string(r.gate) + " is not 0 (ungated) or 3 (normalised), which routers of several leaves have");
  const bool boundary = r.gate == FASTFF_BOUNDARY || r.gate == FASTFF_BOUNDARY_MIN;
  need(!boundary || (r.tau > 0 && std::isfinite(r.tau)), "tau must be positive and finite");
}

template <class T>
int32_t route_plain(RouteKernel<T> RouterKernels::*kernel, const fastff_router* given, const T* w, const T* b,
                    const T* balance, const T* x, int64_t rows, const Chosen<T>& out, int threads) {
  return guarded([&] {
    const Router router = checked(given);
    need_router_weights(router, w, b, balance);
    check_route(router, x, rows, out,
                {array("w", w, router.weight_rows() * router.weight_features()), array("b", b, b ? router.weight_rows() : 0),
                 array("balance", balance, balance ? router.balances() : 0)});
    RouterView<T> view{};
    view.w = w;
    view.stride = router.weight_features();
    view.b = b;
    view.balance = balance;
    route_rows(router_kernels().*kernel, router, view, x, rows, out, threads);
  });
}

}  // namespace

Router checked(const fastff_router* r) {
  need(r != nullptr, "router must not be NULL");
  need_in("kind", r->kind, FASTFF_TREES, FASTFF_PRODUCT_KEYS);
  need_in("in_features", r->in_features, 1, kMaxSize);
  need_in("reserved", r->reserved, 0, 0);
  check_choice(*r);
  check_gate(*r);
  const double trees = static_cast<double>(r->trees);
  const bool is_trees = r->kind == FASTFF_TREES || r->kind == FASTFF_PATHS;
  const double rows = is_trees ? std::ldexp(trees, r->depth) : 2 * static_cast<double>(r->candidates);
  need(rows < 2147483648.0, "a router must have fewer than 2^31 rows of weights");
  need(rows * static_cast<double>(r->in_features) * sizeof(double) < kAddressable,
       "weights need more memory than can be addressed");
  return {r->in_features, r->trees, r->candidates, r->chosen, r->kind, r->depth, r->gate, r->tau};
}

void need_rows(const Router& router, int64_t rows) {
  need_in("rows", rows, 0, kMaxRows);
  const double widest = std::max(static_cast<double>(router.in_features),
                                 static_cast<double>(router.trees) * std::max<double>(router.chosen, router.depth));
  need(static_cast<double>(rows) * widest * sizeof(double) < kAddressable,
       "rows need more memory than can be addressed");
}

template <class T>
void need_router_weights(const Router& router, const T* w, const T* b, const T* balance) {
  need(w != nullptr || router.weight_rows() == 0, "w must not be NULL");
  need(!balance || router.balances() > 0, "balance must be NULL for greedy trees, which compare nothing");
  need_aligned({array("w", w, 0), array("b", b, 0), array("balance", balance, 0)});
}
template void need_router_weights(const Router&, const float*, const float*, const float*);

template <class T>
void check_route(const Router& router, const T* x, int64_t rows, const Chosen<T>& out, Arrays weights) {
  need_rows(router, rows);
  if (rows == 0) return;
  need(x && out.leaf && out.gate, "x, leaf and gate must not be NULL");
  const Array leaf = array("leaf", out.leaf, rows * router.per_row()), gate = array("gate", out.gate, rows * router.per_row()),
              scores = array("scores", out.scores, rows * router.row_scores());
  const Array input = array("x", x, rows * router.in_features);
  need_aligned({input, leaf, gate, scores});
  need_disjoint({leaf, gate, scores}, {input});
  need_disjoint({leaf, gate, scores}, weights);
}
template void check_route(const Router&, const float*, int64_t, const Chosen<float>&, Arrays);

template <class T, class W>
void route_rows(RouteKernel<T, W> kernel, const Router& router, const RouterView<T, W>& view, const T* x, int64_t rows,
                const Chosen<T>& out, int threads) {
  const int64_t cuts = pieces_of(rows, kRowsAPiece, threads);
  if (cuts > 1 || router.trees == 1)
    return parallel(rows, kRowsAPiece, threads,
                    [&](int64_t begin, int64_t end) { kernel(router, view, x, {begin, end, 0, router.trees}, out); });
  parallel(router.trees, std::max<int64_t>(1, kPathsAPiece / std::max<int64_t>(1, rows)), threads,
           [&](int64_t begin, int64_t end) { kernel(router, view, x, {0, rows, begin, end}, out); });
}
template void route_rows(RouteKernel<float>, const Router&, const RouterView<float>&, const float*, int64_t,
                         const Chosen<float>&, int);
template void route_rows(RouteKernel<float, int16_t>, const Router&, const RouterView<float, int16_t>&, const float*,
                         int64_t, const Chosen<float>&, int);

}  // namespace fastff

using namespace fastff;

extern "C" {

int32_t fastff_route_f32(const fastff_router* router, const float* w, const float* b, const float* balance,
                         const float* x, int64_t rows, int64_t* leaf, float* gate, float* scores, int32_t threads) {
  return route_plain<float>(&RouterKernels::f32, router, w, b, balance, x, rows, {leaf, gate, scores}, threads);
}

int32_t fastff_route_f64(const fastff_router* router, const double* w, const double* b, const double* balance,
                         const double* x, int64_t rows, int64_t* leaf, double* gate, double* scores, int32_t threads) {
  return route_plain<double>(&RouterKernels::f64, router, w, b, balance, x, rows, {leaf, gate, scores}, threads);
}

}  // extern "C"
