// Kernels of model/linear.h, for the instruction set whose Words<int8_t> the including file has defined.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "isa/table.h"
#include "layer/activations.h"
#include "model/bf16_lanes.h"
#include "model/fast_gelu.h"
#include "model/linear.h"
#include "model/linear_groups_impl.h"
#include "model/linear_rows_impl.h"
#include "model/linear_sums_impl.h"
#ifdef __AMX_INT8__
#include "model/linear_group_tiles_impl.h"
#endif

namespace fastff {
namespace {

// ---- from sums to y ----

constexpr int64_t kFinishedRows = 32;  // whose sums are finished together at most

// A product: all but which part of it.
struct Product {
  const PackedMatrix& matrix;
  const QuantisedRows& x;
  const Epilogue& epilogue;
  const ProductRows& y;

  const uint8_t* panel(int64_t number) const { return matrix.data + number * matrix.panel_bytes(); }
};

// Half a panel: twice 16 lanes, which in a gated one are gates and their values.
struct PanelHalf {
  int64_t panel, number, lanes[2];
};
inline PanelHalf half_of(const PackedMatrix& matrix, int64_t panel, int64_t number) {
  if (matrix.gated) return {panel, number, {number * kLineLanes, kPanel / 2 + number * kLineLanes}};
  return {panel, number, {number * 2 * kLineLanes, (number * 2 + 1) * kLineLanes}};
}

// Sums of half a panel with rows from `first_row` on; those of the next row of bytes are `stride` further.
struct Sums {
  PanelHalf half;
  const int32_t* lanes[2];
  int64_t stride, first_row, rows;
};

// Sums of 16 lanes times scales, plus bias. offset: what the offset of the weights' bytes added.
template <int planes>
inline void scale_lanes(const int32_t* __restrict upper, const int32_t* __restrict lower, uint32_t offset, float row_scale,
                        const float* __restrict scale, const float* __restrict bias, float* __restrict to) {
  for (int64_t i = 0; i < kLineLanes; ++i) {
    uint32_t sum = static_cast<uint32_t>(lower[i]) - offset;
    if (planes == 2) sum += static_cast<uint32_t>(upper[i]) * 256;
    to[i] = static_cast<float>(static_cast<int32_t>(sum)) * (scale[i] * row_scale) + bias[i];
  }
}

// v[end - begin][2][16]
template <int planes>
inline void scaled_sums(const Product& o, const Sums& sums, int64_t begin, int64_t end, float* v) {
  alignas(64) float scales[kPanel], bias[kPanel] = {};
  std::memcpy(scales, o.panel(sums.half.panel + 1) - sizeof scales, sizeof scales);
  if (o.epilogue.bias) std::memcpy(bias, o.epilogue.bias + sums.half.panel * kPanel, sizeof bias);
  for (int64_t r = begin; r < end; ++r)
    for (int group = 0; group < 2; ++group, v += kLineLanes) {
      const int64_t lane = sums.half.lanes[group];
      const int32_t* upper = sums.lanes[group] + r * planes * sums.stride;
      scale_lanes<planes>(upper, upper + (planes - 1) * sums.stride, static_cast<uint32_t>(o.x.offset[sums.first_row + r]),
                          o.x.scale[sums.first_row + r], scales + lane, bias + lane, v);
    }
}

// Of 16 numbers the first n.
inline void store_lanes(const Epilogue& epilogue, const ProductRows& y, int64_t at, const float* __restrict v, int64_t n) {
  if (y.narrow) {
    uint16_t* to = y.narrow + at;
    if (n == kLineLanes) return to_bf16_lanes(v, to);
    for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(v[i]);
    return;
  }
  float* __restrict to = y.wide + at;
  if (n != kLineLanes) {
    for (int64_t i = 0; i < n; ++i) to[i] = epilogue.add ? to[i] + v[i] : v[i];
  } else if (epilogue.add) {
    for (int64_t i = 0; i < kLineLanes; ++i) to[i] += v[i];
  } else {
    std::memcpy(to, v, kLineLanes * sizeof *to);
  }
}

// to[rows][16]: activated gates times values of v[rows][gates, values][16].
inline void gated_values(const Epilogue& epilogue, int64_t rows, const float* __restrict v, float* __restrict to) {
  alignas(64) float gates[kFinishedRows * kLineLanes];
  for (int64_t r = 0; r < rows; ++r) std::memcpy(gates + r * kLineLanes, v + r * kBlockLanes, kLineLanes * sizeof *v);
  if (epilogue.activation == FASTFF_GELU) map_value<FastGelu>(gates, to, rows * kLineLanes);
  else map_value<Silu>(gates, to, rows * kLineLanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < kLineLanes; ++i) to[r * kLineLanes + i] *= v[r * kBlockLanes + kLineLanes + i];
}

// Of `rows` rows from first_row on half a panel's values v[rows][2][16], scaled and with bias: their activation, stored.
inline void finish_values(const Product& o, const PanelHalf& half, int64_t first_row, int64_t rows, const float* v) {
  alignas(64) float changed[kFinishedRows * kBlockLanes];
  const int64_t numbers = rows * kBlockLanes;
  const float* out = changed;
  if (o.matrix.gated) gated_values(o.epilogue, rows, v, changed);
  else if (o.epilogue.activation == FASTFF_GELU) map_value<FastGelu>(v, changed, numbers);
  else if (o.epilogue.activation != FASTFF_IDENTITY) activate(o.epilogue.activation, v, changed, numbers);
  else out = v;
  const int64_t lanes = o.matrix.panel_outputs() / (kPanel / kBlockLanes);
  const int64_t first = half.panel * o.matrix.panel_outputs() + half.number * lanes;
  const int64_t left = std::min(lanes, o.matrix.out_features - first);
  for (int64_t r = 0; r < rows; ++r, out += lanes)
    for (int64_t c = 0; c < left; c += kLineLanes)
      store_lanes(o.epilogue, o.y, (first_row + r) * o.y.stride + first + c, out + c, std::min(kLineLanes, left - c));
}

enum class StoredAs { kWide, kAdded, kNarrow };

// Rows [begin, end) of the sums of a plane, all of whose 32 lanes are stored: in one pass from sums to y.
template <class Activation, StoredAs form>
void finish_whole_rows(const Product& o, const Sums& sums, int64_t begin, int64_t end) {
  alignas(64) float scale[kBlockLanes], bias[kBlockLanes] = {};
  const int64_t lane = sums.half.lanes[0];
  std::memcpy(scale, reinterpret_cast<const float*>(o.panel(sums.half.panel + 1)) - kPanel + lane, sizeof scale);
  if (o.epilogue.bias) std::memcpy(bias, o.epilogue.bias + sums.half.panel * kPanel + lane, sizeof bias);
  for (int64_t r = begin; r < end; ++r) {
    const int32_t* __restrict sum = sums.lanes[0] + r * sums.stride;
    const auto offset = static_cast<uint32_t>(o.x.offset[sums.first_row + r]);
    const float row_scale = o.x.scale[sums.first_row + r];
    alignas(64) float v[kBlockLanes];
    for (int64_t i = 0; i < kBlockLanes; ++i) {
      const auto whole = static_cast<int32_t>(static_cast<uint32_t>(sum[i]) - offset);
      v[i] = Activation::value(static_cast<float>(whole) * (scale[i] * row_scale) + bias[i]);
    }
    const int64_t at = (sums.first_row + r) * o.y.stride + sums.half.panel * kPanel + lane;
    if constexpr (form == StoredAs::kNarrow) {
      for (int64_t i = 0; i < kBlockLanes; i += kLineLanes) to_bf16_lanes(v + i, o.y.narrow + at + i);
    } else {
      float* __restrict to = o.y.wide + at;
      for (int64_t i = 0; i < kBlockLanes; ++i) to[i] = form == StoredAs::kAdded ? to[i] + v[i] : v[i];
    }
  }
}

template <class Activation>
void finish_whole_rows_of(const Product& o, const Sums& sums, int64_t begin, int64_t end) {
  if (o.y.narrow) finish_whole_rows<Activation, StoredAs::kNarrow>(o, sums, begin, end);
  else if (o.epilogue.add) finish_whole_rows<Activation, StoredAs::kAdded>(o, sums, begin, end);
  else finish_whole_rows<Activation, StoredAs::kWide>(o, sums, begin, end);
}

// Rows [begin, end) of the sums, at most kFinishedRows.
inline void finish_rows(const Product& o, const Sums& sums, int64_t begin, int64_t end) {
  const bool whole = sums.half.panel * kPanel + sums.half.lanes[0] + kBlockLanes <= o.matrix.out_features;
  if (whole && o.x.planes == 1 && !o.matrix.gated) {
    if (o.epilogue.activation == FASTFF_IDENTITY) return finish_whole_rows_of<Identity>(o, sums, begin, end);
    if (o.epilogue.activation == FASTFF_GELU) return finish_whole_rows_of<FastGelu>(o, sums, begin, end);
  }
  alignas(64) float v[kFinishedRows * kBlockLanes];
  if (o.x.planes == 1) scaled_sums<1>(o, sums, begin, end, v);
  else scaled_sums<2>(o, sums, begin, end, v);
  finish_values(o, sums.half, sums.first_row + begin, end - begin, v);
}

// ---- panels with all rows ----

constexpr int64_t kAhead = 2048;  // bytes, from what is read of a stream to what is fetched

void panel_by_dots(const Product& o, int64_t number) {
  const QuantisedRows& x = o.x;
  const int64_t steps = o.matrix.steps(), byte_rows = x.rows * x.planes;
  const uint8_t *panel = o.panel(number), *next = o.panel(number + 1);
  const bool many = byte_rows > 4 * kMostByteRows;  // then the panel is in the cache, and a quarter of the next one is
                                                    // fetched by each of the first four groups of rows
  alignas(64) int32_t sums[kMostByteRows * kPanel];
  for (int64_t b = 0, group = 0; b < byte_rows; b += kMostByteRows, ++group) {
    const int n = static_cast<int>(std::min<int64_t>(kMostByteRows, byte_rows - b));
    const int8_t* rows = x.bytes + b * x.stride;
    if (many && group < 4) panel_sums_of<Fetch::kLine>(n, panel, rows, x.stride, steps, next + group * steps * 64, sums);
    else if (!many && group == 0)
      panel_sums_of<Fetch::kStep>(n, panel, rows, x.stride, steps, panel + kAhead, sums);
    else panel_sums_of<Fetch::kNothing>(n, panel, rows, x.stride, steps, panel, sums);
    for (int64_t h = 0; h < kPanel / kBlockLanes; ++h) {
      const PanelHalf half = half_of(o.matrix, number, h);
      finish_rows(o, {half, {sums + half.lanes[0], sums + half.lanes[1]}, kPanel, b / x.planes, n / x.planes}, 0,
                  n / x.planes);
    }
  }
}

// Sums v[rows][2][16] of rows from first_row on with half a panel in groups: times the rows' scales, plus bias, finished.
inline void finish_groups(const Product& o, const PanelHalf& half, int64_t first_row, int64_t rows, float* v) {
  alignas(64) float bias[kPanel] = {};
  if (o.epilogue.bias) std::memcpy(bias, o.epilogue.bias + half.panel * kPanel, sizeof bias);
  float* __restrict to = v;
  for (int64_t r = 0; r < rows; ++r) {
    const float scale = o.x.scale[first_row + r];
    for (const int64_t lane : half.lanes) {
      for (int64_t i = 0; i < kLineLanes; ++i) to[i] = to[i] * scale + bias[lane + i];
      to += kLineLanes;
    }
  }
  finish_values(o, half, first_row, rows, v);
}

inline GroupRows group_rows(const QuantisedRows& x, int64_t first) {
  return {x.bytes + first * x.planes * x.stride, x.stride, x.group_sums.data() + first * x.groups(), x.groups()};
}

template <MatrixForm form, int planes>
void panel_by_groups(const Product& o, int64_t number) {
  alignas(64) float sums[kMostGroupRows * kPanel], v[kMostGroupRows * kBlockLanes];
  for (int64_t r = 0; r < o.x.rows; r += kMostGroupRows) {
    const auto n = static_cast<int>(std::min<int64_t>(kMostGroupRows, o.x.rows - r));
    group_panel_of<form, planes>(n, o.panel(number), group_rows(o.x, r), o.matrix.groups(), r == 0 ? kAhead : 0, sums);
    for (int64_t h = 0; h < kPanel / kBlockLanes; ++h) {
      const PanelHalf half = half_of(o.matrix, number, h);
      for (int64_t at = 0; at < 2 * n; ++at)
        std::copy_n(sums + at / 2 * kPanel + half.lanes[at % 2], kLineLanes, v + at * kLineLanes);
      finish_groups(o, half, r, n, v);
    }
  }
}

#ifdef __AMX_INT8__
template <MatrixForm form, int planes>
void panels_by_group_tiles(const Product& o, int64_t begin, int64_t end) {
  static thread_local WidePanel<form> wide;
  alignas(64) float v[kPanel / kBlockLanes][kGroupTileRows * kBlockLanes];
  const Tiles tiles{GroupTileShapes(group_inputs(form))};
  for (int64_t p = begin; p < end; ++p) {
    wide.read(o.panel(p), o.matrix.groups());
    FetchedAhead next(o.panel(p + 1), p + 1 < end ? o.matrix.panel_bytes() : 0, (o.x.rows + kGroupTileRows - 1) / kGroupTileRows);
    for (int64_t r = 0; r < o.x.rows; r += kGroupTileRows) {
      next.step();
      const int64_t n = std::min(kGroupTileRows, o.x.rows - r);
      group_tile_block<form, planes>(wide, group_rows(o.x, r), o.matrix.groups(), o.matrix.gated, v[0]);
      for (int64_t h = 0; h < kPanel / kBlockLanes; ++h) finish_groups(o, half_of(o.matrix, p, h), r, n, v[h]);
    }
  }
}
#endif

template <MatrixForm form, int planes>
void panels_by_groups(const Product& o, int64_t begin, int64_t end) {
#ifdef __AMX_INT8__
  if (o.x.rows >= kGroupTilesFromRows) return panels_by_group_tiles<form, planes>(o, begin, end);
#endif
  for (int64_t p = begin; p < end; ++p) panel_by_groups<form, planes>(o, p);
}

template <MatrixForm form>
void panels_in_form(const Product& o, int64_t begin, int64_t end) {
  if (o.x.planes == 1) panels_by_groups<form, 1>(o, begin, end);
  else panels_by_groups<form, 2>(o, begin, end);
}

#ifdef __AMX_INT8__
// All rows pass half a panel, then the other half. While tiles sum a block of rows, the other units finish the block before
// and fetch the next panel.
class ByTiles {
 public:
  explicit ByTiles(const Product& product) : o_(product), steps_(product.matrix.steps()) {
    const int64_t blocks = (byte_rows() + kTileByteRows - 1) / kTileByteRows * (kPanel / kBlockLanes);
    lines_ = (16 * kStepBytes / 64 + blocks - 1) / blocks;
    rows_ = (kTileByteRows / o_.x.planes + steps_ / 16 - 1) / (steps_ / 16);
  }

  void panel(int64_t number) {
    const QuantisedRows& x = o_.x;
    const uint8_t* weights = o_.panel(number);
    fetched_ = o_.panel(number + 1);
    for (int64_t h = 0; h < kPanel / kBlockLanes; ++h) {
      const PanelHalf half = half_of(o_.matrix, number, h);
      for (int64_t b = 0; b < byte_rows(); b += kTileByteRows) {
        int32_t* sums = room_[used_ ^= 1];
        tile_sums(weights + half.lanes[0] * 4, (half.lanes[1] - half.lanes[0]) * 4, x.bytes + b * x.stride, x.stride,
                  steps_, sums, [&] {
                    for (int64_t l = 0; l < lines_; ++l, fetched_ += 64) __builtin_prefetch(fetched_, 0, 2);
                    finish(rows_);
                  });
        finish(kFinishedRows);
        before_ = {half, {sums, sums + kLineLanes}, kBlockLanes, b / x.planes,
                   std::min(kTileByteRows, byte_rows() - b) / x.planes};
        finished_ = 0;
      }
    }
  }

  // At most so many rows of the block before.
  void finish(int64_t rows) {
    const int64_t end = std::min(finished_ + rows, before_.rows);
    if (finished_ < end) finish_rows(o_, before_, finished_, end);
    finished_ = end;
  }

 private:
  int64_t byte_rows() const { return o_.x.rows * o_.x.planes; }

  const Product& o_;
  int64_t steps_, lines_, rows_;  // of a panel; fetched and finished at every 16 steps
  const uint8_t* fetched_ = nullptr;
  Sums before_{};
  int64_t finished_ = 0;  // rows of it
  int used_ = 0;
  alignas(64) int32_t room_[2][kTileByteRows * kBlockLanes];
};
#endif

void multiply_linear(const PackedMatrix& matrix, const QuantisedRows& x, const Epilogue& epilogue, const ProductRows& y,
                     int64_t begin, int64_t end) {
  const Product product{matrix, x, epilogue, y};
  switch (matrix.form) {
    case MatrixForm::kGroups8: return panels_in_form<MatrixForm::kGroups8>(product, begin, end);
    case MatrixForm::kGroups4: return panels_in_form<MatrixForm::kGroups4>(product, begin, end);
    case MatrixForm::kGroups4Least: return panels_in_form<MatrixForm::kGroups4Least>(product, begin, end);
    case MatrixForm::kLongGroups8: return panels_in_form<MatrixForm::kLongGroups8>(product, begin, end);
    case MatrixForm::kRows8: break;
  }
#ifdef __AMX_INT8__
  if (x.rows * x.planes >= kTilesFromByteRows) {
    const Tiles tiles;
    ByTiles sums(product);
    for (int64_t p = begin; p < end; ++p) sums.panel(p);
    sums.finish(kFinishedRows);
    return;
  }
#endif
  for (int64_t p = begin; p < end; ++p) panel_by_dots(product, p);
}

}  // namespace

const LinearKernels FASTFF_TABLE(linear) = {quantise_linear, multiply_linear};

}  // namespace fastff
