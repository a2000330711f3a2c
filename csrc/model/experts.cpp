#include "model/experts.h"

#include <algorithm>
#include <cmath>
#include <limits>
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

// A row of weights in 8 bits, one number `step(i)` bytes after `to` each; returns its scale, NaN for a row with NaN or an
// infinity.
template <class Value, class Step>
float store_row(int64_t n, const Value& value, const Step& step, int8_t* to) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(value(i))) return std::numeric_limits<float>::quiet_NaN();
    largest = std::max(largest, std::fabs(value(i)));
  }
  const float inverse = largest > 0 ? 127 / largest : 0;
  for (int64_t i = 0; i < n; ++i) to[step(i)] = static_cast<int8_t>(std::lrint(value(i) * inverse));
  return largest / 127;
}

}  // namespace

ExpertShape::ExpertShape(const fastff_leaves& of)
    : hidden(of.in_features),
      leaves(of.leaves),
      width(of.leaf_width),
      activation(of.activation),
      neurons(round_up(width, gated() ? kTileOutputs : kBlockRows)),
      depth(neurons) {
  if (neurons <= kTileInputs) return;
  depth = kTileInputs;
  neurons = round_up(width, depth);
}

bool Experts::fit(const RoutedWeights& w) {
  const int32_t activation = w.leaves.activation;
  const bool known = activation == FASTFF_SWIGLU || activation == FASTFF_GELU || activation == FASTFF_RELU;
  return expert_kernels() && known && w.leaves.leaf_width >= kLeastWidth && w.leaves.leaf_width <= kMostWidth &&
         w.leaves.in_features % kTileInputs == 0;
}

Experts::Experts(const RoutedWeights& w, const float* factors)
    : kernels_(expert_kernels()),
      shape_(w.leaves),
      router_(make_router_pack(checked(&w.router), FASTFF_INT8)),
      in_(shape_.leaves * shape_.in_bytes()),
      out_(shape_.leaves * shape_.out_bytes()),
      scale_in_(shape_.leaves * shape_.in_rows()),
      scale_out_(shape_.leaves * shape_.neurons),
      b_in_(scale_in_.size()) {
  if (router_->router.leaves() != shape_.leaves)
    refuse("the router chooses among " + std::to_string(router_->router.leaves()) + " leaves, expected " +
           std::to_string(shape_.leaves));
  router_->fill(w.rows.data(), w.bias.data(), w.balance.data());
  for (int64_t leaf = 0; leaf < shape_.leaves; ++leaf)
    for (int64_t neuron = 0; neuron < shape_.width; ++neuron) {
      for (int64_t value = 0; value < (shape_.gated() ? 2 : 1); ++value) fill_in(w, factors, leaf, neuron, value);
      fill_out(w, leaf, neuron);
    }
  if (const float* b = w.b_out.data()) b_out_.assign(b, b + shape_.leaves * shape_.hidden);
}

void Experts::fill_in(const RoutedWeights& w, const float* factors, int64_t leaf, int64_t neuron, int64_t value) {
  const ExpertShape& s = shape_;
  const int64_t tile = kTileOutputs * kTileInputs, from = leaf * s.width * (s.gated() ? 2 : 1) + value * s.width + neuron;
  const int64_t at = s.in_row(neuron, value), block = at / kBlockRows, half = at % kBlockRows / kTileOutputs;
  const float* row = w.w_in.data() + from * s.hidden;
  int8_t* to = reinterpret_cast<int8_t*>(in_.data()) + leaf * s.in_bytes() + block * kBlockRows * s.hidden + half * tile +
               at % kTileOutputs * 4;
  scale_in_[leaf * s.in_rows() + at] = store_row(
      s.hidden, [&](int64_t i) { return factors ? row[i] / factors[i] : row[i]; },
      [&](int64_t i) { return i / kTileInputs * 2 * tile + i % kTileInputs / 4 * kLine + i % 4; }, to);
  if (w.b_in.data()) b_in_[leaf * s.in_rows() + at] = w.b_in.data()[from];
}

void Experts::fill_out(const RoutedWeights& w, int64_t leaf, int64_t neuron) {
  const ExpertShape& s = shape_;
  const float* row = w.w_out.data() + (leaf * s.width + neuron) * s.hidden;
  int8_t* to = reinterpret_cast<int8_t*>(out_.data()) + leaf * s.out_bytes() + neuron / s.depth * (s.depth / 4) * kLine +
               neuron % s.depth / 4 * kLine + neuron % 4;
  scale_out_[leaf * s.neurons + neuron] = store_row(
      s.hidden, [&](int64_t i) { return row[i]; },
      [&](int64_t i) { return i / kTileOutputs * (s.neurons / 4) * kLine + i % kTileOutputs * 4; }, to);
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
                           reinterpret_cast<const int8_t*>(out_.data()), scale_in_.data(), scale_out_.data(), b_in_.data(),
                           b_out_.empty() ? nullptr : b_out_.data(), numbers, visits, memory.groups.data(), count, memory.gate.data(), memory.factors.data(),
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
