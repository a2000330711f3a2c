// How a forward cuts its work: sizes shared by the kernels and by fastff_plan_forward, which tells them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layer/kernels.h"

namespace fastff {
namespace {  // of each file: an instruction set's copy must not be linked into another's

constexpr int kSplitAtLeast = 4;       // a shorter list of rows walks in lockstep instead of being split
constexpr int kPairAtLeast = 8;        // from this many rows on, two levels are scored in one pass over x
constexpr int kWalkers = 4;            // rows that walk in lockstep
constexpr int64_t kPathsAPiece = 16;   // fewer paths, one a row and tree, are not worth a second thread
constexpr int64_t kBlockRows = 65536;  // rows whose scores are kept at a time
constexpr int64_t kForestBytes = 3 << 19;  // likewise with several trees, which all read x and add to y: both at a time
constexpr int64_t kCachedRows = 256;   // rows of x that a core's cache holds beside a subtree

// Rows taken through all trees before the next rows. x and y should stay in the second-level cache from tree to tree, but
// there must be enough of them to pay for reading a tree's weights again. Sizes of an element in bytes.
inline int64_t block_rows(const Tree& tree, int64_t weight_bytes, int64_t x_bytes) {
  if (tree.trees == 1) return kBlockRows;
  const int64_t weights = (tree.in_rows() * tree.in_features + tree.out_rows() * tree.out_features) * weight_bytes;
  const int64_t row = (tree.in_features + tree.out_features) * x_bytes;
  return std::clamp<int64_t>(std::max(kForestBytes, 4 * weights) / row, 16, kBlockRows);
}

inline int64_t rows_a_piece(const Tree& tree) { return std::max<int64_t>(1, kPathsAPiece / tree.trees); }

// Levels to pass in small blocks of rows, so that each subtree below has about as many rows as fit the cache.
inline int top_levels(const Tree& tree, int64_t rows) {
  int levels = 0;
  while (levels < tree.depth && levels < 8 && (rows >> levels) > kCachedRows) ++levels;
  return levels;
}

}  // namespace
}  // namespace fastff
