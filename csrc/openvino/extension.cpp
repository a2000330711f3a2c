// fastff's conditional layers as operations inside OpenVINO: an OpenVINO extension, built only with its headers.
//
// FastffTrees   inputs x, w_in, w_out, then b_in and b_out where the attributes say so: the layer of fastff_pack_f32
// FastffRouted  inputs x, w_in, w_out, router's w, then its b, balance, b_in and b_out likewise: that of fastff_layer_pack_f32
//
// Weights are constants of the model. A node packs them at its first evaluation and keeps the copy; rows are shared out
// over OpenVINO's own threads, and no other pool runs.
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <openvino/core/except.hpp>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <vector>

#include "fastff.h"

namespace {

constexpr int64_t kRowsPerThread = 16;  // with fewer, sharing them out costs more than it brings
enum Input { kX, kWIn, kWOut, kFirstOther };

void check(int32_t status) {
  if (status != FASTFF_OK) OPENVINO_THROW("fastff: ", fastff_error());
}

const float* data(const ov::TensorVector& inputs, size_t index) {
  return static_cast<const float*>(inputs.at(index).data(ov::element::f32));
}

int64_t size(const ov::TensorVector& inputs, size_t index, int64_t from_end = 1) {
  const auto& shape = inputs.at(index).get_shape();
  return static_cast<int64_t>(shape.at(shape.size() - from_end));
}

// The weights of a node, as many as its attributes ask for: fastff reads so far, and a file may have come to say otherwise.
// A file that is mapped may hold them anywhere, and fastff takes aligned ones: others are copied.
class Weights {
 public:
  explicit Weights(const ov::TensorVector& inputs) : inputs_(inputs) {}

  // numbers: floating, so that no attribute makes their product overflow.
  const float* at(size_t index, double numbers) {
    const float* found = data(inputs_, index);
    OPENVINO_ASSERT(static_cast<double>(inputs_[index].get_size()) == numbers, "fastff: input ", index, " of shape ",
                    inputs_[index].get_shape(), " does not hold the ", numbers, " numbers of the layer's attributes");
    if (reinterpret_cast<uintptr_t>(found) % alignof(float) == 0) return found;
    auto& copy = copies_.emplace_back(inputs_[index].get_size());
    std::memcpy(copy.data(), found, copy.size() * sizeof(float));
    return copy.data();
  }

  // The next input after those that every node has; nullptr for one that this node lacks.
  const float* take(double numbers, bool present = true) { return present ? at(next_++, numbers) : nullptr; }

 private:
  const ov::TensorVector& inputs_;
  std::vector<std::vector<float>> copies_;
  size_t next_ = kFirstOther;
};

double leaves_of_depth(int64_t depth) { return std::ldexp(1.0, static_cast<int>(std::clamp<int64_t>(depth, 0, 64))); }

// Rows of w_in of a leaf.
double leaf_rows(int64_t leaf_width, int64_t activation) {
  return static_cast<double>(leaf_width) * (activation == FASTFF_SWIGLU ? 2 : 1);
}

// Calls infer(first, rows) on pieces of all rows.
template <class Infer>
void share_rows(int64_t rows, const Infer& infer) {
  const int64_t threads = tbb::this_task_arena::max_concurrency();
  const int64_t pieces = std::max<int64_t>(1, std::min(threads, rows / kRowsPerThread));
  if (pieces == 1) return infer(int64_t{0}, rows);
  tbb::parallel_for(int64_t{0}, pieces, [&](int64_t piece) {
    const int64_t first = rows * piece / pieces;
    infer(first, rows * (piece + 1) / pieces - first);
  });
}

struct Trees {
  using Packed = fastff_packed;
  static constexpr const char* kName = "FastffTrees";
  int64_t depth = 0, trees = 1, leaf_width = 1, activation = 0, gate = 0, weights = 0;
  bool node_output = true, b_in = false, b_out = false;
  float tau = 0.5F;

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("depth", depth);
    visitor.on_attribute("trees", trees);
    visitor.on_attribute("leaf_width", leaf_width);
    visitor.on_attribute("activation", activation);
    visitor.on_attribute("gate", gate);
    visitor.on_attribute("weights", weights);
    visitor.on_attribute("node_output", node_output);
    visitor.on_attribute("b_in", b_in);
    visitor.on_attribute("b_out", b_out);
    visitor.on_attribute("tau", tau);
  }

  size_t inputs() const { return kFirstOther + b_in + b_out; }

  Packed* pack(const ov::TensorVector& inputs) const {
    const fastff_tree tree{size(inputs, kWIn),
                           size(inputs, kWOut),
                           trees,
                           leaf_width,
                           static_cast<int32_t>(depth),
                           node_output,
                           static_cast<int32_t>(activation),
                           static_cast<int32_t>(gate),
                           tau};
    Weights w(inputs);
    const auto count = static_cast<double>(trees), in = static_cast<double>(tree.in_features);
    const auto out = static_cast<double>(tree.out_features);
    const double leaves = leaves_of_depth(depth), in_rows = leaves - 1 + leaves * leaf_rows(leaf_width, activation);
    const double out_rows = (node_output ? leaves - 1 : 0) + leaves * static_cast<double>(leaf_width);
    const float* bias_in = w.take(count * in_rows, b_in);
    const float* bias_out = w.take(count * leaves * out, b_out);
    Packed* packed = nullptr;
    check(fastff_pack_f32(&tree, w.at(kWIn, count * in_rows * in), bias_in, w.at(kWOut, count * out_rows * out), bias_out,
                          static_cast<int32_t>(weights), &packed));
    return packed;
  }

  static void infer(const Packed* packed, const float* x, float* y, int64_t rows) {
    check(fastff_infer_f32(packed, x, y, rows, 1));
  }

  static void free(Packed* packed) { fastff_packed_free(packed); }
};

struct Routed {
  using Packed = fastff_layer;
  static constexpr const char* kName = "FastffRouted";
  int64_t kind = 0, trees = 1, candidates = 0, chosen = 1, depth = 0, gate = 0, activation = 0, weights = 0;
  bool bias = false, balance = false, b_in = false, b_out = false;
  float tau = 0.5F;

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("kind", kind);
    visitor.on_attribute("trees", trees);
    visitor.on_attribute("candidates", candidates);
    visitor.on_attribute("chosen", chosen);
    visitor.on_attribute("depth", depth);
    visitor.on_attribute("gate", gate);
    visitor.on_attribute("activation", activation);
    visitor.on_attribute("weights", weights);
    visitor.on_attribute("bias", bias);
    visitor.on_attribute("balance", balance);
    visitor.on_attribute("b_in", b_in);
    visitor.on_attribute("b_out", b_out);
    visitor.on_attribute("tau", tau);
  }

  size_t inputs() const { return kFirstOther + 1 + bias + balance + b_in + b_out; }

  // Rows of the router's weights.
  double scores() const {
    if (kind == FASTFF_TREES || kind == FASTFF_PATHS) return static_cast<double>(trees) * (leaves_of_depth(depth) - 1);
    return static_cast<double>(candidates) * (kind == FASTFF_PRODUCT_KEYS ? 2 : 1);
  }

  // Numbers of the balance of a router of so many leaves: of paths, nodes have some too.
  double balances(double leaves) const { return kind == FASTFF_PATHS ? scores() + leaves : leaves; }

  Packed* pack(const ov::TensorVector& inputs) const {
    const int64_t in_features = size(inputs, kWIn);
    const fastff_router router{in_features,
                               trees,
                               candidates,
                               chosen,
                               static_cast<int32_t>(kind),
                               static_cast<int32_t>(depth),
                               static_cast<int32_t>(gate),
                               0,
                               tau};
    const fastff_leaves leaves{in_features, size(inputs, kWOut), size(inputs, kWOut, 3), size(inputs, kWOut, 2),
                               static_cast<int32_t>(activation)};
    Weights w(inputs);
    const auto in = static_cast<double>(in_features), out = static_cast<double>(leaves.out_features);
    const auto there = static_cast<double>(leaves.leaves);
    const double rows = there * leaf_rows(leaves.leaf_width, activation);
    const float* routing = w.take(scores() * (kind == FASTFF_PRODUCT_KEYS ? in / 2 : in));
    const float* routing_bias = w.take(scores(), bias);
    const float* selection_bias = w.take(balances(there), balance);
    const float* bias_in = w.take(rows, b_in);
    const float* bias_out = w.take(there * out, b_out);
    Packed* packed = nullptr;
    check(fastff_layer_pack_f32(&router, routing, routing_bias, selection_bias, &leaves, w.at(kWIn, rows * in), bias_in,
                                w.at(kWOut, there * static_cast<double>(leaves.leaf_width) * out), bias_out,
                                static_cast<int32_t>(weights), &packed));
    return packed;
  }

  static void infer(const Packed* packed, const float* x, float* y, int64_t rows) {
    check(fastff_layer_infer_f32(packed, x, y, rows, 1));
  }

  static void free(Packed* packed) { fastff_layer_free(packed); }
};

// x (..., in_features) to y (..., out_features), both f32.
template <class Layer>
class ConditionalOp : public ov::op::Op {
 public:
  OPENVINO_OP(Layer::kName, "fastff");

  ConditionalOp() = default;
  ConditionalOp(const ov::OutputVector& inputs, const Layer& layer) : Op(inputs), layer_(layer) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    const size_t expected = layer_.inputs();
    NODE_VALIDATION_CHECK(this, get_input_size() == expected, get_input_size(), " inputs, expected ", expected);
    auto shape = get_input_partial_shape(kX);
    const auto& w_out = get_input_partial_shape(kWOut);
    if (shape.rank().is_static()) {
      NODE_VALIDATION_CHECK(this, shape.size() > 0, "x is a scalar, expected (..., in_features)");
      shape[shape.size() - 1] = w_out.rank().is_static() ? w_out[w_out.size() - 1] : ov::Dimension();
    }
    set_output_type(0, ov::element::f32, shape);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    layer_.visit(visitor);
    return true;
  }

  // The clone packs for itself: its weights may be others.
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<ConditionalOp>(inputs, layer_);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const int64_t in_features = size(inputs, kX), out_features = size(inputs, kWOut);
    OPENVINO_ASSERT(in_features == size(inputs, kWIn), "fastff: x has ", in_features, " features, w_in ",
                    size(inputs, kWIn));
    auto shape = inputs[kX].get_shape();
    shape.back() = static_cast<size_t>(out_features);
    outputs[0].set_shape(shape);
    std::call_once(packing_->once, [&] { packing_->packed = layer_.pack(inputs); });
    const float* x = data(inputs, kX);
    auto* y = static_cast<float*>(outputs[0].data(ov::element::f32));
    share_rows(static_cast<int64_t>(inputs[kX].get_size()) / in_features, [&](int64_t first, int64_t rows) {
      Layer::infer(packing_->packed, x + first * in_features, y + first * out_features, rows);
    });
    return true;
  }

 private:
  struct Packing {
    std::once_flag once;
    typename Layer::Packed* packed = nullptr;
    ~Packing() { Layer::free(packed); }
  };
  Layer layer_;
  std::unique_ptr<Packing> packing_ = std::make_unique<Packing>();
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<ConditionalOp<Trees>>>(),
                                     std::make_shared<ov::OpExtension<ConditionalOp<Routed>>>()}));
