// The C boundary of packed leaves: checks, memory of intermediate results, and the split of one call over threads.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/errors.h"
#include "base/huge_pages.h"
#include "base/threads.h"
#include "layer/conditional_arguments.h"
#include "layer/packed_leaves.h"
#include "layer/packed_leaves_fill.h"
#include "layer/activations.h"
#include "layer/scratch.h"
#include "layer/visits_sort.h"

using namespace fastff;

struct fastff_packed_leaves {
  fastff_packed_leaves(const Leaves& leaves, int weights, const LeafWeights<float>& from)
      : layout(leaf_layout(leaves, weights, from.b_in != nullptr)),
        in(leaves.leaves * layout.in_bytes),
        out(layout.all_out_bytes()) {
    fill_leaves(layout, from, in.data(), out.data());
    if (from.b_out) b_out.assign(from.b_out, from.b_out + leaves.leaves * leaves.out_features);
  }

  const LeafLayout layout;
  HugeBuffer in, out;
  std::vector<float> b_out;
};

namespace fastff {
namespace {

constexpr int64_t kFewRows = 24;
constexpr int64_t kMostRows = 2048;          // taken through all phases at once
constexpr int64_t kFactorBytes = 4 << 20;    // likewise, of their factors of w_out
constexpr int64_t kPieceBytes = 96 << 10;    // of weights that are worth a second thread
constexpr int64_t kPieceRows = 32;           // likewise, of rows to prepare
constexpr int64_t kMostInt8Features = 1 << 17;  // whose products' sum fits 32 bits

// Of one thread, kept between calls.
struct Memory {
  SortedVisits visits;
  Buffer<int32_t> place, chosen, rank, x_correction, h_correction;
  Buffer<float> gates, h, x_scale, h_scale;
  Buffer<char> xs, hs;

  static Memory& local() {
    static thread_local Memory memory;
    return memory;
  }
};

// Each item's place, and the leaf at each place.
void find_places(const Visits& visits, Memory& memory, int32_t* place, int32_t* chosen) {
  int32_t* rank = memory.rank.at_least(visits.rows);
  std::fill(rank, rank + visits.rows, 0);
  for (int64_t i = 0; i < visits.items(); ++i) {
    const int64_t row = visits.row(i);
    place[i] = static_cast<int32_t>(row * visits.k + rank[row]++);
    chosen[place[i]] = visits.leaf[i];
  }
}

LeafCall make_call(const fastff_packed_leaves& packed, const ItemArrays<float>& in, float* y) {
  const LeafLayout& l = packed.layout;
  Memory& memory = Memory::local();
  const Visits visits = memory.visits.sort(in.leaf, in.rows, in.k, l.leaves.leaves);
  const int64_t items = visits.items(), rows = visits.rows, neurons = l.neurons();
  int32_t *place = memory.place.at_least(items), *chosen = memory.chosen.at_least(items);
  find_places(visits, memory, place, chosen);
  const bool plain = l.weights == FASTFF_F32, unpadded = plain && l.x_words == l.leaves.in_features;
  float* h = memory.h.at_least(items * neurons + kPad);
  const int64_t hs_bytes = in.k * neurons * (plain ? 4 : 2);
  return {l,
          packed.in.data(),
          packed.out.data(),
          packed.b_out.empty() ? nullptr : packed.b_out.data(),
          visits,
          in.x,
          in.gate,
          y,
          rows <= kFewRows || 2 * items < 3 * l.leaves.leaves,
          place,
          chosen,
          unpadded ? const_cast<char*>(reinterpret_cast<const char*>(in.x)) : memory.xs.at_least(rows * l.x_words * 4),
          memory.x_scale.at_least(rows),
          memory.x_correction.at_least(rows),
          memory.gates.at_least(items),
          h,
          plain ? reinterpret_cast<char*>(h) : memory.hs.at_least(rows * hs_bytes + kLine),
          hs_bytes,
          memory.h_scale.at_least(rows),
          memory.h_correction.at_least(rows)};
}

void infer_block(const fastff_packed_leaves& packed, const ItemArrays<float>& in, float* y, int threads) {
  const LeafCall call = make_call(packed, in, y);
  const LeafLayout& l = call.layout;
  const LeafKernels& kernels = leaf_kernels(l.weights);
  const int64_t items = call.visits.items();
  const auto grain = [](int64_t bytes) { return std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, bytes)); };
  parallel(in.rows, kPieceRows, threads, [&](int64_t begin, int64_t end) { kernels.prepare(call, begin, end); });
  parallel(items, grain(l.in_bytes), threads, [&](int64_t begin, int64_t end) { kernels.scores(call, begin, end); });
  parallel(in.rows, kPieceRows, threads, [&](int64_t begin, int64_t end) { kernels.factors(call, begin, end); });
  parallel(l.steps, grain(items * l.neuron_words * kLine), threads,
           [&](int64_t begin, int64_t end) { kernels.outputs(call, begin, end); });
}

void infer(const fastff_packed_leaves& packed, const ItemArrays<float>& in, float* y, int threads) {
  const Leaves& leaves = packed.layout.leaves;
  const int64_t row_bytes = std::max<int64_t>(1, in.k * packed.layout.neurons() * 4);
  const int64_t block = std::clamp<int64_t>(kFactorBytes / row_bytes, kFewRows + 1, kMostRows);
  for (int64_t row = 0; row < in.rows; row += block) {
    const int64_t rows = std::min(block, in.rows - row);
    infer_block(packed, in.part(leaves, row, rows), y + row * leaves.out_features, threads);
  }
}

void need_packed(const void* packed) { need(packed != nullptr, "packed must not be NULL"); }

}  // namespace
}  // namespace fastff

extern "C" {

int32_t fastff_conditional_pack_f32(const fastff_leaves* given, const float* w_in, const float* b_in, const float* w_out,
                                    const float* b_out, int32_t weights, fastff_packed_leaves** packed) {
  return guarded([&] {
    need_packed(packed);
    const Leaves leaves = checked(given);
    const LeafWeights<float> from = {w_in, b_in, w_out, b_out};
    need_weights(leaves, from);
    need_in("weights", weights, FASTFF_F32, FASTFF_INT8);
    if (weights == FASTFF_INT8) need_in("in_features of int8 leaves", leaves.in_features, 1, kMostInt8Features);
    *packed = new fastff_packed_leaves(leaves, weights, from);
  });
}

int64_t fastff_conditional_packed_bytes(const fastff_packed_leaves* packed) {
  return packed ? packed->in.bytes() + packed->out.bytes() + static_cast<int64_t>(packed->b_out.size() * sizeof(float)) : 0;
}

int32_t fastff_conditional_infer_f32(const fastff_packed_leaves* packed, const float* x, const int64_t* leaf,
                                     const float* gate, int64_t rows, int64_t k, float* y, int32_t threads) {
  return guarded([&] {
    need_packed(packed);
    const Leaves& leaves = packed->layout.leaves;
    const ItemArrays<float> in = {x, leaf, gate, rows, k};
    need_items(leaves, in);
    need(rows == 0 || y, "y must not be NULL");
    const Array out = array("y", y, rows * leaves.out_features);
    need_aligned({out});
    need_disjoint({out}, {x_array(leaves, in), leaf_array(in), gate_array(in)});
    infer(*packed, in, y, threads);
  });
}

void fastff_conditional_packed_free(fastff_packed_leaves* packed) { delete packed; }

}  // extern "C"
