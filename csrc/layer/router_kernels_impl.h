// The table of the routers' kernels for one instruction set.
#include "isa/table.h"
#include "layer/router_beam.h"
#include "layer/router_top.h"
#include "layer/router_trees.h"

namespace fastff {
namespace {

template <class T, class W>
void route(const Router& router, const RouterView<T, W>& view, const T* x, const RoutePiece& piece,
           const Chosen<T>& out) {
  if (router.kind == FASTFF_TREES) Trees<T, W>(router, view, out).run(x, piece);
  else if (router.kind == FASTFF_PATHS) Beams<T, W>(router, view, out).run(x, piece);
  else TopChosen<T, W>(router, view, out).run(x, piece);
}

}  // namespace

const RouterKernels FASTFF_TABLE(router_kernels) = {route<float, float>, route<double, double>, route<float, int16_t>};

}  // namespace fastff
