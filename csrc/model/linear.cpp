#include "model/linear.h"

#include <algorithm>

#include "base/checks.h"
#include "base/huge_pages.h"
#include "base/threads.h"

namespace fastff {
namespace {

constexpr int64_t kTileRows = 32;         // of bytes, that one step of AMX multiplies
constexpr int64_t kGrainBytes = 1 << 15;  // of weights, that are worth another thread

const LinearKernels& kernels() { return FASTFF_CHOSEN_TILE_TABLE(LinearKernels, linear); }

}  // namespace

void check_matrix(const PackedMatrix& shape) {
  need_in("out_features", shape.out_features, 1, kMaxRows);
  need_in("in_features", shape.in_features, 1, kMostInputs);
}

void QuantisedRows::resize(int64_t new_rows, int64_t new_features, int bits, bool with_groups) {
  rows = new_rows;
  features = new_features;
  planes = bits == 16 ? 2 : 1;
  stride = round_up(features, kInputs);
  if (stride % 1024 == 0) stride += kLine;  // else the rows of a tile would lie in the same few sets of the cache
  const auto needed = static_cast<size_t>(round_up(rows * planes, kTileRows) * stride + kLine);
  if (room.size() < needed) room.resize(needed);
  bytes = reinterpret_cast<int8_t*>(round_up(reinterpret_cast<intptr_t>(room.data()), kLine));
  if (static_cast<int64_t>(scale.size()) < rows) scale.resize(rows), offset.resize(rows);
  grouped = with_groups;
  if (grouped && static_cast<int64_t>(group_sums.size()) < round_up(rows, kTileRows) * groups()) group_sums.resize(round_up(rows, kTileRows) * groups());
}

void quantise_rows(const float* x, int64_t x_stride, int64_t rows, int64_t features, const float* factors, int bits,
                   int threads, QuantisedRows& to, bool grouped) {
  to.resize(rows, features, bits, grouped);
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
