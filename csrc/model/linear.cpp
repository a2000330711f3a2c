#include "model/linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checks.h"
#include "base/huge_pages.h"
#include "base/threads.h"

namespace fastff {
namespace {

constexpr int64_t kTileRows = 32;         // of bytes, that one step of AMX multiplies
constexpr int64_t kGrainBytes = 1 << 15;  // of weights, that are worth another thread

const LinearKernels& kernels() { return FASTFF_CHOSEN_TILE_TABLE(LinearKernels, linear); }

// Which row of the weights a lane of a panel holds; -1 for none.
int64_t source_row(const PackedMatrix& shape, int64_t panel, int64_t lane) {
  const int64_t outputs = shape.panel_outputs(), output = panel * outputs + lane % outputs;
  if (output >= shape.out_features) return -1;
  return lane < outputs ? output : shape.out_features + output;
}

void pack_row(const float* weights, int64_t n, int64_t lane, uint8_t* panel, float* scale) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(weights[i]));
  *scale = largest / 127;
  const float inverse = largest > 0 ? 127 / largest : 0;
  for (int64_t i = 0; i < n; ++i)
    panel[(i / 4 * kPanel + lane) * 4 + i % 4] = static_cast<uint8_t>(std::lrint(weights[i] * inverse) + 128);
}

}  // namespace

void check_matrix(const PackedMatrix& shape) {
  need_in("out_features", shape.out_features, 1, kMaxRows);
  need_in("in_features", shape.in_features, 1, kMostInputs);
}

void pack_matrix(const PackedMatrix& shape, const float* weights, uint8_t* to) {
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
  float scale;
  std::memcpy(&scale, panel + matrix.steps() * kPanel * 4 + lane * sizeof scale, sizeof scale);
  for (int64_t i = 0; i < matrix.in_features; ++i)
    to[i] = scale * static_cast<float>(panel[(i / 4 * kPanel + lane) * 4 + i % 4] - 128);
}

void QuantisedRows::resize(int64_t new_rows, int64_t new_features, int bits) {
  rows = new_rows;
  features = new_features;
  planes = bits == 16 ? 2 : 1;
  stride = round_up(features, kInputs);
  if (stride % 1024 == 0) stride += kLine;  // else the rows of a tile would lie in the same few sets of the cache
  const auto needed = static_cast<size_t>(round_up(rows * planes, kTileRows) * stride + kLine);
  if (room.size() < needed) room.resize(needed);
  bytes = reinterpret_cast<int8_t*>(round_up(reinterpret_cast<intptr_t>(room.data()), kLine));
  if (static_cast<int64_t>(scale.size()) < rows) scale.resize(rows), offset.resize(rows);
}

void quantise_rows(const float* x, int64_t x_stride, int64_t rows, int64_t features, const float* factors, int bits,
                   int threads, QuantisedRows& to) {
  to.resize(rows, features, bits);
  const auto quantise = kernels().quantise;
  parallel(rows, std::max<int64_t>(1, kGrainBytes / features), threads,
           [&](int64_t begin, int64_t end) { quantise(x, x_stride, factors, begin, end, to); });
}

void multiply(const PackedMatrix& matrix, const QuantisedRows& x, const Epilogue& epilogue, const ProductRows& y,
              int threads) {
  if (x.rows == 0) return;
  const auto kernel = kernels().multiply;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / (matrix.panel_bytes() * x.rows));
  parallel(matrix.panels(), grain, threads, [&](int64_t begin, int64_t end) {
    kernel(matrix, x, epilogue, y, begin, end);
  });
}

}  // namespace fastff
