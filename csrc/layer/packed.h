// What every copy of a tree layer's weights for inference does.
#pragma once

#include <cstring>
#include <memory>

#include "layer/arguments.h"
#include "layer/kernels.h"

struct fastff_packed {
  static constexpr int32_t kWatched = FASTFF_WATCHED;

  explicit fastff_packed(const fastff::Tree& t) : tree(t) {}
  virtual ~fastff_packed() = default;
  fastff_packed(const fastff_packed&) = delete;
  fastff_packed& operator=(const fastff_packed&) = delete;

  virtual void fill(const fastff::Weights<float>& w) = 0;
  virtual void forward(const float* x, int64_t rows, const fastff::Forward<float>& out, int threads) const = 0;
  virtual int64_t bytes() const = 0;

  // Few places, because each is a cache line: four lines of each tensor cost several microseconds where layers take turns
  // and evict each other's page translations.
  bool stale() const {
    for (const Watched& w : watched)
      if (w.at && std::memcmp(w.at, w.bytes, sizeof w.bytes) != 0) return true;
    return false;
  }
  void watch(const void* const* places, int32_t count) {
    for (int32_t i = 0; i < kWatched; ++i) {
      watched[i].at = i < count ? places[i] : nullptr;
      if (watched[i].at) std::memcpy(watched[i].bytes, watched[i].at, sizeof watched[i].bytes);
    }
  }

  const fastff::Tree tree;

 private:
  struct Watched {
    const void* at;
    char bytes[4];
  };
  Watched watched[kWatched] = {};
};

namespace fastff {

// Several trees whose nodes only route, quantised: a packed router and packed leaves.
bool is_forest(const Tree& tree, int32_t weights);
std::unique_ptr<fastff_packed> make_forest_pack(const Tree& tree, int32_t weights);

}  // namespace fastff
