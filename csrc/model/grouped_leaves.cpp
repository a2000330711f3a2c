#include "model/grouped_leaves.h"

#include <algorithm>
#include <stdexcept>

#include "base/checks.h"
#include "base/errors.h"
#include "base/huge_pages.h"
#include "base/threads.h"
#include "layer/visits_sort.h"

namespace fastff {

namespace {

constexpr int64_t kGrainRows = 16;  // that are worth another thread

// What one thread needs; kept from call to call.
struct Workspace {
  QuantisedRows x, some, hidden;
  std::vector<float> neurons, given, gate;
  std::vector<int64_t> leaf;
  SortedVisits visits;

  static Workspace& local() {
    static thread_local Workspace workspace;
    return workspace;
  }
  static float* room(std::vector<float>& of, int64_t numbers) {
    if (static_cast<int64_t>(of.size()) < numbers) of.resize(numbers);
    return of.data();
  }
};

// Rows of `from` one after another.
template <class RowOf>
void gather(const QuantisedRows& from, int64_t rows, const RowOf& row_of, QuantisedRows& to) {
  to.resize(rows, from.features, from.planes == 2 ? 16 : 8, true);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t source = row_of(r);
    std::copy_n(from.bytes + source * from.planes * from.stride, from.planes * from.stride,
                to.bytes + r * to.planes * to.stride);
    to.scale[r] = from.scale[source];
    to.offset[r] = from.offset[source];
    std::copy_n(from.group_sums.data() + source * from.groups(), from.groups(), to.group_sums.data() + r * to.groups());
  }
}

}  // namespace

int64_t GroupedLeaves::filled(const fastff_leaves& shape) {
  return round_up(shape.leaf_width, shape.activation == FASTFF_SWIGLU ? kPanel / 2 : kPanel);
}

GroupedLeaves::GroupedLeaves(const WeightsFile& file, const std::string& name, const fastff_leaves& shape,
                             fastff_packed_router* router, int64_t leaves_of_a_row)
    : router_(router), shape_(shape), width_(filled(shape)), leaves_of_a_row_(leaves_of_a_row) {
  const bool gated = shape.activation == FASTFF_SWIGLU;
  in_ = file.matrix(name + "w_in", shape.leaves * width_, shape.in_features, gated);
  out_ = file.matrix(name + "w_out", shape.leaves * round_up(shape.out_features, kPanel), width_);
  if (!in_.grouped() || !out_.grouped()) refuse(name + "w_in or w_out has no groups");
  if (file.has(name + "b_in")) {
    const float* bias = file.numbers(name + "b_in", {in_.rows()});
    pack_bias(in_, bias, (b_in_.resize(in_.panels() * kPanel), b_in_.data()));
  }
  if (file.has(name + "b_out")) b_out_ = file.widened(name + "b_out", {shape.leaves, shape.out_features});
}

PackedMatrix GroupedLeaves::part(const PackedMatrix& stack, int64_t leaf, int64_t outputs) const {
  PackedMatrix one = stack;
  one.out_features = outputs;
  one.data += leaf * one.bytes();
  return one;
}

void GroupedLeaves::run(const float* x, int64_t rows, float* y, int threads) const {
  parallel(rows, kGrainRows, threads, [&](int64_t begin, int64_t end) {
    run_rows(x + begin * shape_.in_features, end - begin, y + begin * shape_.out_features);
  });
}

void GroupedLeaves::run_rows(const float* x, int64_t rows, float* y) const {
  Workspace& w = Workspace::local();
  w.leaf.resize(rows * leaves_of_a_row_);
  w.gate.resize(w.leaf.size());
  if (fastff_router_infer_f32(router_.get(), x, rows, w.leaf.data(), w.gate.data(), 1) != FASTFF_OK)
    throw std::runtime_error(last_error());
  const Visits visits = w.visits.sort(w.leaf.data(), rows, leaves_of_a_row_, shape_.leaves);
  quantise_rows(x, shape_.in_features, rows, shape_.in_features, nullptr, 16, 1, w.x, true);
  std::fill_n(y, rows * shape_.out_features, 0.0f);
  for (int64_t at = 0, end; at < visits.items(); at = end) {
    end = visits.group_end(at, visits.items());
    run_leaf(visits.leaf[at], w.x, visits, at, end, w.gate.data(), y);
  }
}

// Adds what a leaf gives to the rows of its visits [begin, end). gates: of all items.
void GroupedLeaves::run_leaf(int64_t leaf, const QuantisedRows& x, const Visits& visits, int64_t begin, int64_t end,
                             const float* gates, float* y) const {
  Workspace& w = Workspace::local();
  const int64_t rows = end - begin, out = shape_.out_features;
  const auto row_of = [&](int64_t r) { return visits.row(begin + r); };
  if (x.rows > 1) gather(x, rows, row_of, w.some);
  float *neurons = Workspace::room(w.neurons, rows * width_), *given = Workspace::room(w.given, rows * out);
  const float* bias = b_in_.empty() ? nullptr : b_in_.data() + leaf * (b_in_.size() / shape_.leaves);
  multiply(part(in_, leaf, width_), x.rows > 1 ? w.some : x, {bias, shape_.activation, false}, {neurons, nullptr, width_},
           1);
  for (int64_t r = 0; r < rows; ++r) {
    const float gate = gates[visits.item[begin + r]];
    for (int64_t i = 0; i < width_; ++i) neurons[r * width_ + i] *= gate;
  }
  quantise_rows(neurons, width_, rows, width_, nullptr, 16, 1, w.hidden, true);
  PackedMatrix down = part(out_, leaf, round_up(out, kPanel));
  down.out_features = out;
  multiply(down, w.hidden, {}, {given, nullptr, out}, 1);
  for (int64_t r = 0; r < rows; ++r) {
    const float gate = gates[visits.item[begin + r]];
    float* to = y + row_of(r) * out;
    for (int64_t i = 0; i < out; ++i) to[i] += given[r * out + i];
    if (b_out_.data())
      for (int64_t i = 0; i < out; ++i) to[i] += gate * b_out_.data()[leaf * out + i];
  }
}

}  // namespace fastff
