// Weights rounded and arranged in the layouts of model/linear.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checks.h"
#include "model/linear.h"

namespace fastff {
namespace {

// Which row of the weights a lane of a panel holds; -1 for none.
int64_t source_row(const PackedMatrix& shape, int64_t panel, int64_t lane) {
  const int64_t outputs = shape.panel_outputs(), output = panel * outputs + lane % outputs;
  if (output >= shape.out_features) return -1;
  return lane < outputs ? output : shape.out_features + output;
}

// ---- one scale a row ----

void pack_row(const float* weights, int64_t n, int64_t lane, uint8_t* panel, float* scale) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(weights[i]));
  *scale = largest / 127;
  const float inverse = largest > 0 ? 127 / largest : 0;
  for (int64_t i = 0; i < n; ++i)
    panel[(i / 4 * kPanel + lane) * 4 + i % 4] = static_cast<uint8_t>(std::lrint(weights[i] * inverse) + 128);
}

void pack_rows(const PackedMatrix& shape, const float* weights, uint8_t* to) {
  const int64_t weight_bytes = shape.steps() * kPanel * 4;
  for (int64_t p = 0; p < shape.panels(); ++p, to += shape.panel_bytes()) {
    float scales[kPanel] = {};
    std::memset(to, 128, weight_bytes);
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = source_row(shape, p, lane);
      if (row >= 0) pack_row(weights + row * shape.in_features, shape.in_features, lane, to, scales + lane);
    }
    std::memcpy(to + weight_bytes, scales, sizeof scales);
  }
}

// ---- a scale a group ----

constexpr int64_t kMostGroup = 2 * kGroup;

// A group of one output row: numbers as they are stored, above their value unless there is a minimum.
struct Group {
  uint8_t number[kMostGroup];
  Half scale, least;
};

float finite_half(Half value, const char* what) {
  const float wide = to_float(value);
  if (!std::isfinite(wide)) refuse(std::string(what) + " of a group of weights is too large for half precision, or not finite");
  return wide;
}

float largest_of(const float* w, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::fabs(w[i]) > std::fabs(largest) ? w[i] : largest;
  return largest;
}

// Numbers from -most_negative to most_positive, stored above zero.
void round_group(const float* w, int64_t n, float scale, int most_negative, int most_positive, Group& to) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto number = static_cast<int>(std::lrint(w[i] * inverse));
    to.number[i] = static_cast<uint8_t>(std::clamp(number, -most_negative, most_positive) + most_negative);
  }
}

Group round8(const float* w, int64_t n) {
  Group group{};
  group.scale = to_half(std::fabs(largest_of(w, n)) / 127);
  round_group(w, n, finite_half(group.scale, "the scale"), 128, 127, group);
  return group;
}

double squared_error(const float* w, const Group& group) {
  const float scale = to_float(group.scale);
  double error = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float off = w[i] - scale * static_cast<float>(group.number[i] - 8);
    error += off * off;
  }
  return error;
}

// The scale that suits these numbers best.
float fitted(const float* w, const Group& group) {
  float products = 0, squares = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    const auto number = static_cast<float>(group.number[i] - 8);
    products += w[i] * number;
    squares += number * number;
  }
  return squares > 0 ? products / squares : 0;
}

// Of scales around the one that makes the largest weight -8, each fitted to its numbers, the one of least squared error.
Group round4(const float* w) {
  const float largest = largest_of(w, kGroup);
  Group best{};
  double least_error = -1;
  for (int i = 0; i < 13; ++i) {
    Group group{};
    group.scale = to_half(largest / (-8.6f + 0.25f * static_cast<float>(i)));
    round_group(w, kGroup, finite_half(group.scale, "the scale"), 8, 7, group);
    group.scale = to_half(fitted(w, group));
    const double error = squared_error(w, group);
    if (least_error >= 0 && error >= least_error) continue;
    least_error = error;
    best = group;
  }
  return best;
}

Group round4_least(const float* w) {
  const auto [least, most] = std::minmax_element(w, w + kGroup);
  Group group{};
  group.least = to_half(*least);
  group.scale = to_half((*most - *least) / 15);
  const float minimum = finite_half(group.least, "the minimum"), scale = finite_half(group.scale, "the scale");
  for (int64_t i = 0; i < kGroup; ++i) {
    const long number = scale > 0 ? std::lrint((w[i] - minimum) / scale) : 0;
    group.number[i] = static_cast<uint8_t>(std::clamp(number, 0l, 15l));
  }
  return group;
}

Group rounded_group(MatrixForm form, const float* w) {
  if (in_bytes(form)) return round8(w, group_inputs(form));
  return form == MatrixForm::kGroups4 ? round4(w) : round4_least(w);
}

// From a block of GGUF: scale, minimum if there is one, numbers; 4 bits have the lower halves first.
Group read_block(MatrixForm form, const uint8_t* block) {
  Group group{};
  std::memcpy(&group.scale, block, sizeof group.scale);
  finite_half(group.scale, "the scale");
  block += sizeof group.scale;
  if (form == MatrixForm::kGroups8) {
    for (int64_t i = 0; i < kGroup; ++i) group.number[i] = static_cast<uint8_t>(block[i] + 128);
    return group;
  }
  if (form == MatrixForm::kGroups4Least) {
    std::memcpy(&group.least, block, sizeof group.least);
    finite_half(group.least, "the minimum");
    block += sizeof group.least;
  }
  for (int64_t i = 0; i < kGroup / 2; ++i) {
    group.number[i] = block[i] & 15;
    group.number[i + kGroup / 2] = block[i] >> 4;
  }
  return group;
}

// Where number i of a lane is in a group of a panel: a byte, and of 4 bits the lower or the upper half.
int64_t place_of(MatrixForm form, int64_t lane, int64_t i) {
  const int64_t step = i / 4, line = in_bytes(form) ? step : step / 2;
  return (line * kPanel + lane) * 4 + i % 4;
}
int shift_of(MatrixForm form, int64_t i) { return !in_bytes(form) && i / 4 % 2 ? 4 : 0; }

Half* scales_of(const PackedMatrix& shape, uint8_t* group) {
  return reinterpret_cast<Half*>(group + shape.group_bytes()) - kPanel * (shape.form == MatrixForm::kGroups4Least ? 2 : 1);
}

void place_group(const PackedMatrix& shape, const Group& group, int64_t lane, uint8_t* to) {
  for (int64_t i = 0; i < shape.group_inputs(); ++i)
    to[place_of(shape.form, lane, i)] |= static_cast<uint8_t>(group.number[i] << shift_of(shape.form, i));
  Half* scales = scales_of(shape, to);
  scales[lane] = group.scale;
  if (shape.form == MatrixForm::kGroups4Least) scales[kPanel + lane] = group.least;
}

// group(row, number): of the weights.
template <class F>
void pack_groups(const PackedMatrix& shape, uint8_t* to, const F& group) {
  std::memset(to, 0, shape.bytes());
  for (int64_t p = 0; p < shape.panels(); ++p, to += shape.panel_bytes())
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = source_row(shape, p, lane);
      if (row < 0) continue;
      for (int64_t g = 0; g < shape.groups(); ++g)
        place_group(shape, group(row, g), lane, to + g * shape.group_bytes());
    }
}

}  // namespace

void pack_matrix(const PackedMatrix& shape, const float* weights, uint8_t* to) {
  if (!shape.grouped()) return pack_rows(shape, weights, to);
  pack_groups(shape, to, [&](int64_t row, int64_t g) {
    float w[kMostGroup] = {};
    const int64_t first = g * shape.group_inputs();
    std::copy_n(weights + row * shape.in_features + first, std::min(shape.group_inputs(), shape.in_features - first), w);
    return rounded_group(shape.form, w);
  });
}

int64_t block_bytes(MatrixForm form) {
  if (form == MatrixForm::kGroups8) return 2 + kGroup;
  return (form == MatrixForm::kGroups4 ? 2 : 4) + kGroup / 2;
}

void pack_blocks(const PackedMatrix& shape, const uint8_t* blocks, uint8_t* to) {
  if (shape.form == MatrixForm::kLongGroups8) refuse("groups of 64 inputs have no blocks");
  if (shape.in_features % kGroup)
    refuse("in_features " + std::to_string(shape.in_features) + " of blocks is no multiple of 32");
  pack_groups(shape, to, [&](int64_t row, int64_t g) {
    return read_block(shape.form, blocks + (row * shape.groups() + g) * block_bytes(shape.form));
  });
}

void pack_bias(const PackedMatrix& shape, const float* bias, float* to) {
  for (int64_t p = 0; p < shape.panels(); ++p)
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = source_row(shape, p, lane);
      to[p * kPanel + lane] = row < 0 ? 0 : bias[row];
    }
}

void unpack_row(const PackedMatrix& matrix, int64_t output, float* to) {
  const uint8_t* panel = matrix.data + output / kPanel * matrix.panel_bytes();
  const int64_t lane = output % kPanel;
  if (!matrix.grouped()) {
    float scale;
    std::memcpy(&scale, panel + matrix.steps() * kPanel * 4 + lane * sizeof scale, sizeof scale);
    for (int64_t i = 0; i < matrix.in_features; ++i)
      to[i] = scale * static_cast<float>(panel[(i / 4 * kPanel + lane) * 4 + i % 4] - 128);
    return;
  }
  const bool bytes = in_bytes(matrix.form), least = matrix.form == MatrixForm::kGroups4Least;
  for (int64_t i = 0; i < matrix.in_features; ++i) {
    const int64_t in_group = i % matrix.group_inputs();
    const uint8_t* group = panel + i / matrix.group_inputs() * matrix.group_bytes();
    const Half* scales = scales_of(matrix, const_cast<uint8_t*>(group));
    int number = group[place_of(matrix.form, lane, in_group)] >> shift_of(matrix.form, i) & (bytes ? 255 : 15);
    if (!least) number -= bytes ? 128 : 8;
    to[i] = to_float(scales[lane]) * static_cast<float>(number) + (least ? to_float(scales[kPanel + lane]) : 0.0f);
  }
}

}  // namespace fastff
