// Packed routers: fp32 rows, or 16 bits beside the fp32 rows that decide where 16 bits cannot.
#include "layer/router_pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/checks.h"
#include "base/dispatch.h"
#include "base/errors.h"
#include "base/huge_pages.h"
#include "layer/router_quantise.h"

namespace fastff {
namespace {

constexpr float kLargestReach = 1e20f;  // with a row of x of any size that is stored in 16 bits, fp32 sums stay finite

class RouterPack : public fastff_packed_router {
 public:
  RouterPack(const Router& r) : fastff_packed_router(r), exact_(r.weight_rows() * r.weight_features() * sizeof(float)) {}

  void fill(const float* w, const float* b, const float* balance) override {
    const int64_t rows = router.weight_rows();
    if (rows > 0) std::memcpy(exact_.data(), w, rows * router.weight_features() * sizeof(float));
    assign(b_, b, rows);
    assign(balance_, balance, router.balances());
  }

  void route(const float* x, int64_t rows, const Chosen<float>& out, int threads) const override {
    RouterView<float> view{};
    view.w = exact();
    view.stride = router.weight_features();
    shared(view);
    route_rows(router_kernels().f32, router, view, x, rows, out, threads);
  }

  int64_t bytes() const override { return exact_.bytes(); }

 protected:
  const float* exact() const { return reinterpret_cast<const float*>(exact_.data()); }

  template <class W>
  void shared(RouterView<float, W>& view) const {
    view.b = b_.empty() ? nullptr : b_.data();
    view.balance = balance_.empty() ? nullptr : balance_.data();
  }

 private:
  static void assign(std::vector<float>& to, const float* from, int64_t n) {
    if (from) to.assign(from, from + n);
    else to.clear();
  }

  HugeBuffer exact_;
  std::vector<float> b_, balance_;
};

class RouterPack16 final : public RouterPack {
 public:
  explicit RouterPack16(const Router& r)
      : RouterPack(r),
        stride_(round_up(r.weight_features(), kUnit)),
        stored_(r.weight_rows() * stride_ * static_cast<int64_t>(sizeof(int16_t))),
        scale_(r.weight_rows()),
        error_(r.weight_rows()),
        reach_(r.weight_rows()),
        tiles_(tile_bytes(r)) {}

  void fill(const float* w, const float* b, const float* balance) override {
    RouterPack::fill(w, b, balance);
    const int64_t n = router.weight_features();
    for (int64_t i = 0; i < router.weight_rows(); ++i) {
      int16_t* to = stored() + i * stride_;
      const Row16 row = store_row16(w + i * n, n, stride_, to);
      describe(i, w + i * n, to, row.scale);
    }
    if (tiles_.bytes() > 0) fill_tiles();
  }

  void route(const float* x, int64_t rows, const Chosen<float>& out, int threads) const override {
    RouterView<float, int16_t> view{};
    view.w = stored();
    view.stride = stride_;
    view.exact = exact();
    view.scale = scale_.data();
    view.error = error_.data();
    view.reach = reach_.data();
    view.tiles = tiles_.bytes() > 0 ? tiles_.data() : nullptr;
    shared(view);
    route_rows(router_kernels().i16, router, view, x, rows, out, threads);
  }

  int64_t bytes() const override { return RouterPack::bytes() + stored_.bytes() + tiles_.bytes(); }

 private:
  static int64_t tile_bytes(const Router& r) {
    if (!has_tiles() || r.weight_features() > kMostTiledFeatures) return 0;
    const TiledWeights of = tiled_weights(r);
    return of.groups * of.panels() * tile_steps(r.weight_features()) * 2 * kTileBytes;
  }

  // Fresh memory is zero, and so are the rows that fill up a panel.
  void fill_tiles() {
    const TiledWeights of = tiled_weights(router);
    char* panel = tiles_.data();
    for (int64_t group = 0; group < of.groups; ++group)
      for (int64_t first = 0; first < of.tiled_rows; first += kTileRows, panel += tile_steps(stride_) * 2 * kTileBytes)
        for (int64_t j = 0; j < std::min(kTileRows, of.tiled_rows - first); ++j)
          fill_tile_row(stored() + (group * of.group_rows + first + j) * stride_, panel + j * kLine);
  }
  void fill_tile_row(const int16_t* row, char* to) {
    for (int64_t i = 0; i < stride_; ++i) {
      char* tile = to + i / 64 * 2 * kTileBytes + tile_place(i % 64);
      tile[0] = static_cast<char>(row[i] >> 8);
      tile[kTileBytes] = static_cast<char>(row[i] & 255);
    }
  }
  int16_t* stored() const { return reinterpret_cast<int16_t*>(stored_.data()); }

  void describe(int64_t i, const float* w, const int16_t* stored, float scale) {
    double error = 0, reach = 0, norm = 0;
    const int64_t n = router.weight_features();
    for (int64_t j = 0; j < n; ++j) {
      const double meant = static_cast<double>(stored[j]) * scale, difference = meant - w[j];
      error += difference * difference;
      reach += meant * meant;
      norm += static_cast<double>(w[j]) * w[j];
    }
    const double bound = std::sqrt(error) + sum_rounding(n) * (std::sqrt(norm) + std::sqrt(reach));
    scale_[i] = scale;
    reach_[i] = static_cast<float>(std::sqrt(reach) * 1.0001);
    error_[i] = static_cast<float>(bound * 1.0001);
    if (!(norm < static_cast<double>(kLargestReach) * kLargestReach)) error_[i] = std::numeric_limits<float>::infinity();
  }

  int64_t stride_;
  HugeBuffer stored_;
  std::vector<float> scale_, error_, reach_;
  HugeBuffer tiles_;
};

}  // namespace

std::unique_ptr<fastff_packed_router> make_router_pack(const Router& router, int32_t weights) {
  switch (weights) {
    case FASTFF_F32: return std::make_unique<RouterPack>(router);
    case FASTFF_BF16:
    case FASTFF_INT8: return std::make_unique<RouterPack16>(router);
    default: refuse("weights " + std::to_string(weights) + " is not 0 (f32), 1 (bf16) or 2 (int8)");
  }
}

}  // namespace fastff

using namespace fastff;

extern "C" {

int32_t fastff_router_pack_f32(const fastff_router* given, const float* w, const float* b, const float* balance,
                               int32_t weights, fastff_packed_router** packed) {
  return guarded([&] {
    need(packed != nullptr, "packed must not be NULL");
    const Router router = checked(given);
    need_router_weights(router, w, b, balance);
    auto fresh = make_router_pack(router, weights);
    fresh->fill(w, b, balance);
    *packed = fresh.release();
  });
}

int32_t fastff_router_infer_f32(const fastff_packed_router* packed, const float* x, int64_t rows, int64_t* leaf,
                                float* gate, int32_t threads) {
  return guarded([&] {
    need(packed != nullptr, "packed must not be NULL");
    const Chosen<float> out = {leaf, gate, nullptr};
    check_route(packed->router, x, rows, out, {});
    packed->route(x, rows, out, threads);
  });
}

int64_t fastff_router_bytes(const fastff_packed_router* packed) { return packed ? packed->bytes() : 0; }

void fastff_router_free(fastff_packed_router* packed) { delete packed; }

}  // extern "C"
