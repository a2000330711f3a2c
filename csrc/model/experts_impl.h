// Kernels of model/experts.h, for instruction sets with tiles of int8.
#pragma once

#ifdef __AMX_INT8__
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa/tiles.h"
#include "layer/activations.h"
#include "layer/scratch.h"
#include "model/experts.h"
#include "model/fast_gelu.h"
#include "model/linear_rows_impl.h"

namespace fastff {
namespace {

constexpr int64_t kTileRows = 16;         // of x or of factors
constexpr int64_t kTileBytes = kTileOutputs * kTileInputs;
constexpr int64_t kBlockColumns = 1 << 20;  // bytes of y that stay in the cache while all leaves are added to them
constexpr int kMostBlocks = 3;            // whose sums are in tiles at once
constexpr int kColumnTiles = 4;

// Six tiles of sums and one of rows, of `rows` each, and one of weights.
struct ExpertTiles : TileShapes {
  ExpertTiles(int64_t tile_rows, int64_t depth) {
    std::fill(rows, rows + 7, static_cast<uint8_t>(tile_rows));
    row_bytes[6] = static_cast<uint16_t>(depth);
    rows[7] = static_cast<uint8_t>(depth / 4);
  }
};

// Unless they are already for so many rows.
inline void shape_tiles(int64_t rows, int64_t depth, int64_t& shaped) {
  if (rows == shaped) return;
  shape_tiles(ExpertTiles(rows, depth));
  shaped = rows;
}

// sums[rows][blocks][2][16] of rows of x with B blocks of gates and values, `apart` bytes from one to the next.
template <int B>
inline void block_sums(const int8_t* x, int64_t stride, const int8_t* w, int64_t apart, int64_t tiles, FetchedAhead& ahead,
                       int32_t* sums, int64_t sums_stride) {
  written_for_tiles();
  _tile_zero(0);
  _tile_zero(1);
  if (B > 1) _tile_zero(2);
  if (B > 1) _tile_zero(3);
  if (B > 2) _tile_zero(4);
  if (B > 2) _tile_zero(5);
  for (int64_t k = 0; k < tiles; ++k, x += kTileInputs, w += 2 * kTileBytes) {
    _tile_loadd(6, x, stride);
    _tile_loadd(7, w, kLine);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(7, w + kTileBytes, kLine);
    _tile_dpbssd(1, 6, 7);
    if (B > 1) {
      _tile_loadd(7, w + apart, kLine);
      _tile_dpbssd(2, 6, 7);
      _tile_loadd(7, w + apart + kTileBytes, kLine);
      _tile_dpbssd(3, 6, 7);
    }
    if (B > 2) {
      _tile_loadd(7, w + 2 * apart, kLine);
      _tile_dpbssd(4, 6, 7);
      _tile_loadd(7, w + 2 * apart + kTileBytes, kLine);
      _tile_dpbssd(5, 6, 7);
    }
    ahead.step();
  }
  const int64_t bytes = sums_stride * static_cast<int64_t>(sizeof *sums);
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + 16, bytes);
  if (B > 1) _tile_stored(2, sums + 32, bytes);
  if (B > 1) _tile_stored(3, sums + 48, bytes);
  if (B > 2) _tile_stored(4, sums + 64, bytes);
  if (B > 2) _tile_stored(5, sums + 80, bytes);
}

// ---- x to the factors of w_out ----

struct ExpertRoom {
  Buffer<int8_t> x;
  Buffer<int32_t> sums;
  Buffer<float> values;

  static ExpertRoom& local() {
    static thread_local ExpertRoom room;
    return room;
  }
};

// What the i-th neuron of a block gives; x: what the 32 rows of w_in of the block give.
struct GatedNeurons {
  static constexpr int64_t kNeurons = 16;  // of a block
  static float value(const float* x, int64_t i) { return Silu::value(x[i]) * x[16 + i]; }
};
template <class Activation>
struct PlainNeurons {
  static constexpr int64_t kNeurons = 32;
  static float value(const float* x, int64_t i) { return Activation::value(x[i]); }
};

template <class Neurons>
class ExpertNeurons {
 public:
  explicit ExpertNeurons(const ExpertCall& call) : c_(call), s_(call.shape) {
    ExpertRoom& room = ExpertRoom::local();
    stride_ = s_.hidden % 1024 ? s_.hidden : s_.hidden + kLine;  // else a tile's rows would lie in few sets of the cache
    x_ = room.x.at_least(kTileRows * stride_);
    sums_ = room.sums.at_least(kTileRows * s_.in_rows());
    values_ = room.values.at_least(s_.neurons);
  }

  void group(const ExpertGroup& group, const ExpertGroup* next) {
    const int64_t parts = (group.end - group.begin + kTileRows - 1) / kTileRows;
    const int64_t chunks = (s_.blocks() + kMostBlocks - 1) / kMostBlocks;
    if (next) ahead_ = {c_.in + next->leaf * s_.in_bytes(), s_.in_bytes(), parts * chunks * s_.hidden / kTileInputs};
    for (int64_t at = group.begin; at < group.end; at += kTileRows) {
      const int64_t n = std::min(kTileRows, group.end - at);
      gather(at, n);
      shape_tiles(n, kTileInputs, shaped_);
      products(c_.in + group.leaf * s_.in_bytes());
      for (int64_t r = 0; r < n; ++r) finish(group.leaf, at + r, sums_ + r * s_.in_rows());
    }
  }

 private:
  void gather(int64_t at, int64_t n) {
    for (int64_t r = 0; r < n; ++r) std::memcpy(x_ + r * stride_, c_.x.bytes + c_.visits.row(at + r) * c_.x.stride, s_.hidden);
  }

  void products(const int8_t* w) {
    const int64_t apart = kBlockRows * s_.hidden, tiles = s_.hidden / kTileInputs, width = s_.in_rows();
    for (int64_t b = 0; b < s_.blocks(); b += kMostBlocks, w += kMostBlocks * apart) {
      int32_t* sums = sums_ + b * kBlockRows;
      switch (std::min<int64_t>(kMostBlocks, s_.blocks() - b)) {
        case 1: block_sums<1>(x_, stride_, w, apart, tiles, ahead_, sums, width); break;
        case 2: block_sums<2>(x_, stride_, w, apart, tiles, ahead_, sums, width); break;
        default: block_sums<3>(x_, stride_, w, apart, tiles, ahead_, sums, width);
      }
    }
  }

  // The factors of one item.
  void finish(int64_t leaf, int64_t position, const int32_t* sums) {
    const float of_x = c_.x.scale[c_.visits.row(position)], gate = c_.gate[c_.visits.item[position]];
    const float *in = c_.scale_in + leaf * s_.in_rows(), *bias = c_.b_in + leaf * s_.in_rows();
    const float* out = c_.scale_out + leaf * s_.neurons;
    float* v = values_;
    for (int64_t b = 0; b < s_.neurons; b += Neurons::kNeurons, sums += kBlockRows, in += kBlockRows, bias += kBlockRows) {
      alignas(64) float x[kBlockRows];
      for (int64_t i = 0; i < kBlockRows; ++i) x[i] = static_cast<float>(sums[i]) * (of_x * in[i]) + bias[i];
      for (int64_t i = 0; i < Neurons::kNeurons; ++i) v[b + i] = Neurons::value(x, i) * (gate * out[b + i]);
    }
    const uint32_t bits = largest_bits(v, s_.neurons, Unsmoothed{});
    float largest;
    std::memcpy(&largest, &bits, sizeof bits);
    int8_t* to = c_.factors + position * s_.neurons;
    if (bits >= 0x7f800000u || largest < 127 * std::numeric_limits<float>::min()) {
      std::memset(to, 0, s_.neurons);
      c_.scale[position] = bits >= 0x7f800000u ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
      return;
    }
    const float inverse = 127 / largest;
    for (int64_t i = 0; i < s_.neurons; ++i) to[i] = static_cast<int8_t>(rounded(v[i], inverse));
    c_.scale[position] = largest / 127;
  }

  const ExpertCall& c_;
  const ExpertShape& s_;
  int64_t stride_, shaped_ = 0;
  int8_t* x_;
  int32_t* sums_;
  float* values_;
  FetchedAhead ahead_;
};

template <class Neurons>
void neurons_of_groups(const ExpertCall& call, int64_t begin, int64_t end) {
  ExpertNeurons<Neurons> neurons(call);
  for (int64_t g = begin; g < end; ++g) neurons.group(call.groups[g], g + 1 < end ? call.groups + g + 1 : nullptr);
  _tile_release();
}

void expert_neurons(const ExpertCall& call, int64_t begin, int64_t end) {
  switch (call.shape.activation) {
    case FASTFF_SWIGLU: return neurons_of_groups<GatedNeurons>(call, begin, end);
    case FASTFF_RELU: return neurons_of_groups<PlainNeurons<Relu>>(call, begin, end);
    default: return neurons_of_groups<PlainNeurons<FastGelu>>(call, begin, end);
  }
}

// ---- factors to y ----

class ExpertOutputs {
 public:
  explicit ExpertOutputs(const ExpertCall& call) : c_(call), s_(call.shape), tile_bytes_(s_.neurons * kTileOutputs) {}

  // Tiles [begin, end) of 16 columns.
  void columns(int64_t begin, int64_t end) {
    for (int64_t g = 0; g < c_.group_count; ++g) {
      const ExpertGroup& group = c_.groups[g];
      const int64_t parts = (group.end - group.begin + kTileRows - 1) / kTileRows;
      if (g + 1 < c_.group_count)
        ahead_ = {c_.out + c_.groups[g + 1].leaf * s_.out_bytes() + begin * tile_bytes_, (end - begin) * tile_bytes_,
                  parts * (end - begin + kColumnTiles - 1) / kColumnTiles};
      for (int64_t at = group.begin; at < group.end; at += kTileRows) rows(group.leaf, at, std::min(kTileRows, group.end - at), begin, end);
    }
  }

 private:
  void rows(int64_t leaf, int64_t at, int64_t n, int64_t begin, int64_t end) {
    shape_tiles(n, s_.depth, shaped_);
    const int8_t *w = c_.out + leaf * s_.out_bytes(), *factors = c_.factors + at * s_.neurons;
    alignas(64) int32_t sums[kTileRows * kColumnTiles * kTileOutputs];
    int64_t tile = begin;
    for (; tile + kColumnTiles <= end; tile += kColumnTiles) {
      sum<kColumnTiles>(factors, w + tile * tile_bytes_, sums);
      add<kColumnTiles>(leaf, at, n, tile, sums);
    }
    for (; tile < end; ++tile) {
      sum<1>(factors, w + tile * tile_bytes_, sums);
      add<1>(leaf, at, n, tile, sums);
    }
  }

  template <int C>
  void sum(const int8_t* factors, const int8_t* w, int32_t* sums) {
    ahead_.step();
    written_for_tiles();
    _tile_zero(0);
    if (C > 1) _tile_zero(1);
    if (C > 1) _tile_zero(2);
    if (C > 1) _tile_zero(3);
    for (int64_t j = 0; j < s_.neurons; j += s_.depth, w += s_.depth / 4 * kLine) {
      _tile_loadd(6, factors + j, s_.neurons);
      _tile_loadd(7, w, kLine);
      _tile_dpbssd(0, 6, 7);
      if (C > 1) {
        _tile_loadd(7, w + tile_bytes_, kLine);
        _tile_dpbssd(1, 6, 7);
        _tile_loadd(7, w + 2 * tile_bytes_, kLine);
        _tile_dpbssd(2, 6, 7);
        _tile_loadd(7, w + 3 * tile_bytes_, kLine);
        _tile_dpbssd(3, 6, 7);
      }
    }
    constexpr int64_t kBytes = C * kTileOutputs * sizeof *sums;
    _tile_stored(0, sums, kBytes);
    if (C > 1) _tile_stored(1, sums + 16, kBytes);
    if (C > 1) _tile_stored(2, sums + 32, kBytes);
    if (C > 1) _tile_stored(3, sums + 48, kBytes);
  }

  template <int C>
  void add(int64_t leaf, int64_t at, int64_t n, int64_t tile, const int32_t* sums) {
    const float* bias = c_.b_out ? c_.b_out + leaf * s_.hidden + tile * kTileOutputs : nullptr;
    for (int64_t r = 0; r < n; ++r, sums += C * kTileOutputs) {
      const float scale = c_.scale[at + r];
      float* y = c_.y + c_.visits.row(at + r) * s_.hidden + tile * kTileOutputs;
      if (!bias) {
        for (int64_t i = 0; i < C * kTileOutputs; ++i) y[i] += static_cast<float>(sums[i]) * scale;
        continue;
      }
      const float gate = c_.gate[c_.visits.item[at + r]];
      for (int64_t i = 0; i < C * kTileOutputs; ++i) y[i] += static_cast<float>(sums[i]) * scale + gate * bias[i];
    }
  }

  const ExpertCall& c_;
  const ExpertShape& s_;
  const int64_t tile_bytes_;
  int64_t shaped_ = 0;
  FetchedAhead ahead_;
};

void expert_outputs(const ExpertCall& call, int64_t begin, int64_t end) {
  ExpertOutputs outputs(call);
  const int64_t column_bytes = call.x.rows * kTileOutputs * static_cast<int64_t>(sizeof(float));
  const int64_t block = std::max<int64_t>(kColumnTiles, kBlockColumns / std::max<int64_t>(1, column_bytes) / kColumnTiles * kColumnTiles);
  for (int64_t at = begin; at < end; at += block) outputs.columns(at, std::min(end, at + block));
  _tile_release();
}

}  // namespace

extern const ExpertKernels experts_amx;
const ExpertKernels experts_amx = {expert_neurons, expert_outputs};

}  // namespace fastff
#endif
