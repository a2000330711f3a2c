// A copy of a layer's weights for inference: the rows of a neuron side by side, in one buffer on huge pages.
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include <sys/mman.h>

#include "internal.h"

namespace fastff {
namespace {

constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kLineElements = 16;

// Whole cache lines, but not where padding would cost more than an eighth.
int64_t row_elements(int64_t features) {
  return features >= 8 * kLineElements ? (features + kLineElements - 1) / kLineElements * kLineElements : features;
}

}  // namespace
}  // namespace fastff

using namespace fastff;

struct fastff_packed {
  explicit fastff_packed(const Tree& t) : tree(t) {
    in_row = row_elements(t.in_features);
    out_row = row_elements(t.out_features);
    node_stride = in_row + (t.node_output ? out_row : 0);
    leaf_stride = t.leaf_in_rows() * in_row + t.leaf_width * out_row;
    tree_stride = t.nodes() * node_stride + t.leaves() * leaf_stride;
    const int64_t elements = t.trees * tree_stride;
    bytes = (elements * static_cast<int64_t>(sizeof(float)) + kHugePage - 1) / kHugePage * kHugePage;
    void* memory = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapped = memory;
    const auto address = reinterpret_cast<uintptr_t>(memory);
    data = reinterpret_cast<float*>((address + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
    madvise(data, bytes, MADV_HUGEPAGE);  // advice: without it the same code runs on small pages
#endif
  }
  ~fastff_packed() { munmap(mapped, bytes + kHugePage); }
  fastff_packed(const fastff_packed&) = delete;
  fastff_packed& operator=(const fastff_packed&) = delete;

  View<float> view(int64_t t) const {
    View<float> v{};
    const float* base = data + t * tree_stride;
    v.node_in = base;
    v.node_out = base + in_row;
    v.node_in_stride = v.node_out_stride = node_stride;
    v.leaf_in = base + tree.nodes() * node_stride;
    v.leaf_out = v.leaf_in + tree.leaf_in_rows() * in_row;
    v.leaf_in_stride = v.leaf_out_stride = leaf_stride;
    v.leaf_in_row_stride = in_row;
    v.leaf_out_row_stride = out_row;
    v.b_in = b_in.empty() ? nullptr : b_in.data() + t * tree.in_rows();
    v.b_out = b_out.empty() ? nullptr : b_out.data() + t * tree.leaves() * tree.out_features;
    return v;
  }

  void fill(const float* w_in, const float* new_b_in, const float* w_out, const float* new_b_out) {
    for (int64_t t = 0; t < tree.trees; ++t) {
      const View<float> to = view(t);
      const View<float> from = plain_view(tree, t, w_in, new_b_in, w_out, new_b_out);
      for (int64_t n = 0; n < tree.nodes(); ++n) {
        copy(to.in_row(n), from.in_row(n), tree.in_features);
        if (tree.node_output) copy(to.out_row(n), from.out_row(n), tree.out_features);
      }
      for (int64_t leaf = 0; leaf < tree.leaves(); ++leaf) {
        for (int64_t j = 0; j < tree.leaf_in_rows(); ++j)
          copy(to.leaf_in_row(leaf, j), from.leaf_in_row(leaf, j), tree.in_features);
        for (int64_t j = 0; j < tree.leaf_width; ++j)
          copy(to.leaf_out_row(leaf, j), from.leaf_out_row(leaf, j), tree.out_features);
      }
    }
    assign(b_in, new_b_in, tree.trees * tree.in_rows());
    assign(b_out, new_b_out, tree.trees * tree.leaves() * tree.out_features);
    views.clear();
    for (int64_t t = 0; t < tree.trees; ++t) views.push_back(view(t));
  }

  // The first weight of w_in and the last of w_out: enough for an edit of a whole tensor, and only two cache lines. Four
  // lines of each tensor cost several microseconds where layers take turns and evict each other's page translations.
  bool matches(const float* w_in, const float* w_out) const {
    const View<float>& first = views.front();
    const View<float>& last = views.back();
    const float own_in = tree.depth ? first.in_row(0)[0] : first.leaf_in_row(0, 0)[0];
    const float own_out = last.leaf_out_row(tree.leaves() - 1, tree.leaf_width - 1)[tree.out_features - 1];
    return !differ(own_in, w_in[0]) && !differ(own_out, w_out[tree.trees * tree.out_rows() * tree.out_features - 1]);
  }

  Tree tree;
  int64_t in_row, out_row, node_stride, leaf_stride, tree_stride, bytes;
  void* mapped = nullptr;
  float* data = nullptr;
  std::vector<float> b_in, b_out;
  std::vector<View<float>> views;
  const float *watched_in = nullptr, *watched_out = nullptr;

 private:
  static void copy(const float* to, const float* from, int64_t n) {
    std::memcpy(const_cast<float*>(to), from, n * sizeof(float));
  }
  static void assign(std::vector<float>& to, const float* from, int64_t n) {
    if (from) to.assign(from, from + n);
    else to.clear();
  }
  static bool differ(float a, float b) { return std::memcmp(&a, &b, sizeof a) != 0; }
};

namespace {

void need_not_null(const void* pointer) {
  if (!pointer) throw std::invalid_argument("packed must not be NULL");
}

}  // namespace

extern "C" {

int32_t fastff_pack_f32(const fastff_tree* tree, const float* w_in, const float* b_in, const float* w_out,
                        const float* b_out, fastff_packed** packed) {
  return guarded([&] {
    need_not_null(packed);
    const Tree valid = checked(tree);
    need_weights(valid, w_in, b_in, w_out, b_out);
    auto fresh = std::make_unique<fastff_packed>(valid);
    fresh->fill(w_in, b_in, w_out, b_out);
    *packed = fresh.release();
  });
}

int32_t fastff_repack_f32(fastff_packed* packed, const float* w_in, const float* b_in, const float* w_out,
                          const float* b_out) {
  return guarded([&] {
    need_not_null(packed);
    need_weights(packed->tree, w_in, b_in, w_out, b_out);
    packed->fill(w_in, b_in, w_out, b_out);
  });
}

int64_t fastff_packed_bytes(const fastff_packed* packed) { return packed ? packed->bytes : 0; }

int32_t fastff_packed_watch_f32(fastff_packed* packed, const float* w_in, const float* w_out) {
  return guarded([&] {
    need_not_null(packed);
    packed->watched_in = w_in;
    packed->watched_out = w_out;
  });
}

int32_t fastff_forward_packed_f32(const fastff_packed* packed, const float* x, int64_t rows, float* y, int64_t* leaf,
                                  float* margin, int32_t threads) {
  if (packed && packed->watched_in && packed->watched_out && !packed->matches(packed->watched_in, packed->watched_out))
    return FASTFF_STALE;
  return guarded([&] {
    need_not_null(packed);
    forward_rows<float>(packed->tree, packed->views.data(), x, rows, {y, leaf, margin, nullptr}, threads);
  });
}

int32_t fastff_infer_f32(const fastff_packed* packed, const float* x, float* y, int64_t rows, int64_t threads) {
  return fastff_forward_packed_f32(packed, x, rows, y, nullptr, nullptr, static_cast<int32_t>(threads));
}

void fastff_packed_free(fastff_packed* packed) { delete packed; }

}  // extern "C"
