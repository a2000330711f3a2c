// The C functions of a forward on plain weights, and those of the library as a whole.
#include <algorithm>
#include <vector>

#include "base/cpus.h"
#include "base/errors.h"
#include "base/huge_pages.h"
#include "layer/forward_rows.h"

namespace fastff {
namespace {

template <class T, class Kernel>
int32_t forward_plain(const Kernel& kernel_of, const fastff_tree* given, const Weights<T>& w, const T* x, int64_t rows,
                      const Forward<T>& out, int threads) {
  return guarded([&] {
    const Tree tree = checked(given);
    need_rows(tree, rows);
    need_weights(tree, w);
    need_outputs(tree, rows, out, {w_in_array(tree, "w_in", w.w_in), b_in_array(tree, "b_in", w.b_in),
                                   w_out_array(tree, "w_out", w.w_out), b_out_array(tree, "b_out", w.b_out)});
    std::vector<View<T>> views;
    views.reserve(tree.trees);
    for (int64_t t = 0; t < tree.trees; ++t) views.push_back(plain_view(tree, t, w));
    forward_rows(kernel_of(), tree, views.data(), x, rows, out, threads);
  });
}

fastff_plan plan_of(const Tree& tree, int64_t weight_bytes, int64_t rows, int threads) {
  const int64_t pieces = pieces_of(rows, rows_a_piece(tree), threads);
  const int64_t block = block_rows(tree, weight_bytes, sizeof(float));
  const int top = top_levels(tree, std::min(block, (rows + pieces - 1) / pieces));
  fastff_plan plan{};
  plan.threads = static_cast<int32_t>(pieces);
  plan.sorted_levels = top < tree.depth ? top : 0;
  plan.block_rows = block;
  plan.pair_at_least = kPairAtLeast;
  plan.lockstep_below = kSplitAtLeast;
  return plan;
}

}  // namespace
}  // namespace fastff

using namespace fastff;

extern "C" {

int32_t fastff_abi_version(void) { return FASTFF_ABI_VERSION; }

int32_t fastff_processors(void) { return usable_processors(); }

const char* fastff_error(void) { return last_error(); }

const char* fastff_isa(void) {
  const char* name = "";
  guarded([&] { name = isa_name(); });
  return name;
}

int32_t fastff_set_isa(const char* name) {
  return guarded([&] {
    need(name != nullptr, "name must not be NULL");
    set_isa(name);
  });
}

void fastff_set_parallel_for(fastff_parallel_for parallel_for) { set_parallel_for(parallel_for); }

int32_t fastff_forward_f32(const fastff_tree* tree, const float* w_in, const float* b_in, const float* w_out,
                           const float* b_out, const float* x, int64_t rows, float* y, int64_t* leaf, float* margin,
                           float* scores, int32_t threads) {
  return forward_plain<float>([] { return tree_kernels().f32.forward; }, tree, {w_in, b_in, w_out, b_out}, x, rows,
                              {y, leaf, margin, scores}, threads);
}
int32_t fastff_forward_f64(const fastff_tree* tree, const double* w_in, const double* b_in, const double* w_out,
                           const double* b_out, const double* x, int64_t rows, double* y, int64_t* leaf, double* margin,
                           double* scores, int32_t threads) {
  return forward_plain<double>([] { return tree_kernels().f64.forward; }, tree, {w_in, b_in, w_out, b_out}, x, rows,
                               {y, leaf, margin, scores}, threads);
}

int32_t fastff_plan_forward(const fastff_tree* given, int32_t weights, int64_t rows, int32_t threads,
                            fastff_plan* plan) {
  return guarded([&] {
    const Tree tree = checked(given);
    need_rows(tree, rows);
    need_in("weights", weights, FASTFF_F32, FASTFF_INT8);
    need(plan != nullptr, "plan must not be NULL");
    const int64_t sizes[] = {sizeof(float), sizeof(Bf16), sizeof(int8_t)};
    *plan = plan_of(tree, sizes[weights], rows, threads);
  });
}

void fastff_advise_huge_pages(void* data, int64_t bytes) { advise_huge_pages(data, bytes); }

}  // extern "C"
