#include "model/experts.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/checks.h"
#include "base/errors.h"
#include "base/threads.h"
#include "layer/visits_sort.h"

namespace fastff {
namespace {

constexpr int64_t kLeastWidth = 16, kMostWidth = 4096;
constexpr int64_t kGrainTiles = 8;  // of 16 columns of y, worth another thread

// Of one thread, kept between calls.
struct Memory {
  std::vector<int64_t> leaf;
  std::vector<float> gate, scale;
  std::vector<int8_t> factors;
  std::vector<ExpertGroup> groups;
  SortedVisits visits;

  static Memory& local() {
    static thread_local Memory memory;
    return memory;
  }
};

void group_visits(const Visits& visits, std::vector<ExpertGroup>& groups) {
  groups.clear();
  for (int64_t at = 0; at < visits.items(); at = groups.back().end)
    groups.push_back({visits.leaf[at], at, visits.group_end(at, visits.items())});
}

// A row of weights in 8 bits, one number `step(i)` bytes after `to` each; returns its scale.
template <class Value, class Step>
float store_row(int64_t n, const Value& value, const Step& step, int8_t* to) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(value(i)));
  const float inverse = largest > 0 ? 127 / largest : 0;
  for (int64_t i = 0; i < n; ++i) to[step(i)] = static_cast<int8_t>(std::lrint(value(i) * inverse));
  return largest / 127;
}

}  // namespace

ExpertShape::ExpertShape(int64_t hidden, int64_t leaves, int64_t width)
    : hidden(hidden), leaves(leaves), width(width), neurons(round_up(width, kTileOutputs)), depth(neurons) {
  if (neurons <= kTileInputs) return;
  depth = kTileInputs;
  neurons = round_up(width, depth);
}

bool Experts::fit(const RoutedWeights& w) {
  return expert_kernels() && w.leaves.activation == FASTFF_SWIGLU && w.leaves.leaf_width >= kLeastWidth &&
         w.leaves.leaf_width <= kMostWidth && w.leaves.in_features % kTileInputs == 0 && !w.b_in.data() && !w.b_out.data();
}

Experts::Experts(const RoutedWeights& w, const float* factors)
    : kernels_(expert_kernels()),
      shape_(w.leaves.in_features, w.leaves.leaves, w.leaves.leaf_width),
      router_(make_router_pack(checked(&w.router), FASTFF_INT8)),
      in_(shape_.leaves * shape_.in_bytes()),
      out_(shape_.leaves * shape_.out_bytes()),
      scale_in_(shape_.leaves * shape_.neurons * 2),
      scale_out_(shape_.leaves * shape_.neurons) {
  if (router_->router.leaves() != shape_.leaves)
    refuse("the router chooses among " + std::to_string(router_->router.leaves()) + " leaves, expected " +
           std::to_string(shape_.leaves));
  router_->fill(w.rows.data(), w.bias.data(), w.balance.data());
  const ExpertShape& s = shape_;
  const int64_t tile = kTileOutputs * kTileInputs, words = s.depth / 4;
  for (int64_t leaf = 0; leaf < s.leaves; ++leaf)
    for (int64_t j = 0; j < s.width; ++j) {
      const int64_t block = j / kTileOutputs, lane = j % kTileOutputs;
      for (int64_t value = 0; value < 2; ++value) {
        const float* row = w.w_in.data() + ((leaf * 2 + value) * s.width + j) * s.hidden;
        int8_t* to = reinterpret_cast<int8_t*>(in_.data()) + leaf * s.in_bytes() + block * 2 * kTileOutputs * s.hidden +
                     value * tile + lane * 4;
        scale_in_[((leaf * s.blocks() + block) * 2 + value) * kTileOutputs + lane] = store_row(
            s.hidden, [&](int64_t i) { return factors ? row[i] / factors[i] : row[i]; },
            [&](int64_t i) { return i / kTileInputs * 2 * tile + i % kTileInputs / 4 * kLine + i % 4; }, to);
      }
      const float* row = w.w_out.data() + (leaf * s.width + j) * s.hidden;
      int8_t* to = reinterpret_cast<int8_t*>(out_.data()) + leaf * s.out_bytes() + j / s.depth * words * kLine +
                   j % s.depth / 4 * kLine + j % 4;
      scale_out_[leaf * s.neurons + j] = store_row(
          s.hidden, [&](int64_t i) { return row[i]; },
          [&](int64_t i) { return i / kTileOutputs * (s.neurons / 4) * kLine + i % kTileOutputs * 4; }, to);
    }
}

void Experts::add(const float* x, const QuantisedRows& numbers, float* y, int threads) const {
  Memory& memory = Memory::local();
  const int64_t rows = numbers.rows, k = router_->router.per_row(), items = rows * k;
  memory.leaf.resize(items);
  memory.gate.resize(items);
  memory.scale.resize(items);
  memory.factors.resize(items * shape_.neurons + kLine);
  router_->route(x, rows, {memory.leaf.data(), memory.gate.data(), nullptr}, threads);
  const Visits visits = memory.visits.sort(memory.leaf.data(), rows, k, shape_.leaves);
  group_visits(visits, memory.groups);
  const auto count = static_cast<int64_t>(memory.groups.size());
  const ExpertCall call = {shape_, reinterpret_cast<const int8_t*>(in_.data()),
                           reinterpret_cast<const int8_t*>(out_.data()), scale_in_.data(), scale_out_.data(), numbers,
                           visits, memory.groups.data(), count, memory.gate.data(), memory.factors.data(),
                           memory.scale.data(), y};
  parallel(count, 1, threads, [&](int64_t begin, int64_t end) { kernels_->neurons(call, begin, end); });
  parallel(shape_.hidden / kTileOutputs, kGrainTiles, threads,
           [&](int64_t begin, int64_t end) { kernels_->outputs(call, begin, end); });
}

const ExpertKernels* expert_kernels() {
#if defined(__x86_64__)
  extern const ExpertKernels experts_amx;
  if (isa() == Isa::amx) return &experts_amx;
#endif
  return nullptr;
}

}  // namespace fastff
