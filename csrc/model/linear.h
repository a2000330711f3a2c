// Dense products in 8 and 4 bits: a packed weight matrix and its products with few rows and with many.
//
// With one scale an output row (MatrixForm::kRows8) a matrix is cut into panels of 64 output rows, [panel][in_features / 4][64][4] unsigned bytes (the 8-bit weight + 128),
// each panel followed by its 64 fp32 scales. in_features is filled up to a multiple of 64 and out_features to whole panels
// with weights of zero. One layout serves all kernels: four lines of a step feed dot products of four bytes, and 16 steps at
// a stride of 256 bytes are a tile of AMX.
//
// The other forms have a scale to every group of inputs of an output row, in half precision: of 32, as GGUF's Q8_0, Q4_0 and
// Q4_1 have it, so that they hold such weights as they are, or of 64 (kLongGroups8), as many as a tile of AMX multiplies at
// once. A panel is then its groups one after another: the numbers, [8 or 16][64][4]
// unsigned bytes (the weight + 128), or of 4 bits [4][64][4] bytes whose lower halves are the numbers (the weight + 8) of one
// step, the upper halves those of the next; then 64 scales, and of kGroups4Least 64 minima: a weight is number * scale +
// minimum. in_features is filled up to whole groups.
//
// Rows of x are rounded to 8 or 16 bits with one scale a row, 16 bits as two planes of signed bytes. Sums are whole
// numbers, so a row's result is the same bits alone and in any batch, at any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "base/dispatch.h"
#include "base/half.h"
#include "fastff.h"

namespace fastff {

constexpr int64_t kPanel = 64;         // output rows of a panel
constexpr int64_t kInputs = 64;        // in_features are filled up to a multiple of this
constexpr int64_t kGroup = 32;         // inputs that share a scale, in all forms but kLongGroups8
constexpr int64_t kMostInputs = 131072;  // sums of 8-bit products fit 32 bits

// The order is that of enum fastff_matrix_form.
enum class MatrixForm : int { kRows8, kGroups8, kGroups4, kGroups4Least, kLongGroups8 };

constexpr int64_t group_inputs(MatrixForm form) { return form == MatrixForm::kLongGroups8 ? 2 * kGroup : kGroup; }
constexpr bool in_bytes(MatrixForm form) {
  return form == MatrixForm::kRows8 || form == MatrixForm::kGroups8 || form == MatrixForm::kLongGroups8;
}

// A packed matrix in memory of another owner. A gated one holds pairs of output rows: a panel 32 gates, then their values.
struct PackedMatrix {
  const uint8_t* data = nullptr;
  int64_t out_features = 0;  // of y: of a gated matrix the pairs
  int64_t in_features = 0;
  bool gated = false;
  MatrixForm form = MatrixForm::kRows8;

  bool grouped() const { return form != MatrixForm::kRows8; }
  int64_t rows() const { return out_features * (gated ? 2 : 1); }  // of the weights
  int64_t group_inputs() const { return fastff::group_inputs(form); }
  int64_t groups() const { return (in_features + group_inputs() - 1) / group_inputs(); }
  int64_t group_bytes() const {
    const int64_t numbers = group_inputs() * kPanel / (in_bytes(form) ? 1 : 2);
    return numbers + kPanel * static_cast<int64_t>(sizeof(Half)) * (form == MatrixForm::kGroups4Least ? 2 : 1);
  }
  int64_t panel_outputs() const { return gated ? kPanel / 2 : kPanel; }
  int64_t panels() const { return (out_features + panel_outputs() - 1) / panel_outputs(); }
  int64_t steps() const { return (in_features + kInputs - 1) / kInputs * (kInputs / 4); }
  int64_t panel_bytes() const {
    if (grouped()) return groups() * group_bytes();
    return steps() * kPanel * 4 + kPanel * static_cast<int64_t>(sizeof(float));
  }
  int64_t bytes() const { return panels() * panel_bytes(); }
};

// Throws std::invalid_argument for sizes below 1 or beyond what a matrix can hold.
void check_matrix(const PackedMatrix& shape);

// Rounds and arranges weights [out_features (twice for gated: gates, then values)][in_features] into shape.bytes() at `to`.
void pack_matrix(const PackedMatrix& shape, const float* weights, uint8_t* to);

// The same of a grouped matrix from blocks of GGUF, [rows][in_features / 32]: Q8_0, Q4_0 or Q4_1 by shape.form, whose numbers
// and scales are kept. in_features is a multiple of 32. Throws std::invalid_argument for scales that are not finite.
void pack_blocks(const PackedMatrix& shape, const uint8_t* blocks, uint8_t* to);
int64_t block_bytes(MatrixForm form);  // of such a block

// The same arrangement for one number an output row, in the order of the panels: [panels * 64].
void pack_bias(const PackedMatrix& shape, const float* bias, float* to);

// Row `output` of a matrix that is not gated, as fp32.
void unpack_row(const PackedMatrix& matrix, int64_t output, float* to);

// Rows of x as whole numbers.
struct QuantisedRows {
  int64_t rows = 0, features = 0, stride = 0;  // stride: bytes from one row of bytes to the next
  int planes = 1;                              // 2 for 16 bits: row r has its upper bytes in row 2r, its lower in 2r + 1
  std::vector<int8_t> room;
  int8_t* bytes = nullptr;        // [rows * planes][stride], on a cache line; room for whole tiles of 32 rows
  std::vector<float> scale;       // [rows], NaN for a row that is not finite
  std::vector<int32_t> offset;    // [rows], 128 times the sum of its numbers: what the bytes' offset adds to every sum

  bool grouped = false;               // whether these are there:
  std::vector<int32_t> group_sums;    // [rows][groups], of the numbers of 32 inputs; room for 32 rows at least
  int64_t groups() const { return (features + kInputs - 1) / kInputs * (kInputs / kGroup); }

  void resize(int64_t new_rows, int64_t new_features, int bits, bool with_groups);
};

// Rounds rows of x to `bits` (8 or 16), each channel times its factor before, unless factors is null.
// grouped: for a grouped matrix.
void quantise_rows(const float* x, int64_t x_stride, int64_t rows, int64_t features, const float* factors, int bits,
                   int threads, QuantisedRows& to, bool grouped = false);

// What becomes of a product before it is stored.
struct Epilogue {
  const float* bias = nullptr;        // of pack_bias, or null
  int activation = FASTFF_IDENTITY;   // FASTFF_SWIGLU or FASTFF_GELU, of the gates, for a gated matrix
  bool add = false;                   // to what y holds in fp32: the residual
};

// Rows of y, `stride` apart: fp32, or bfloat16 if narrow is not null.
struct ProductRows {
  float* wide;
  uint16_t* narrow;
  int64_t stride;
};

// y[r][0 .. out_features) of every row: act(x W^T + bias).
void multiply(const PackedMatrix& matrix, const QuantisedRows& x, const Epilogue& epilogue, const ProductRows& y,
              int threads);

struct LinearKernels {
  // Rows [begin, end).
  void (*quantise)(const float* x, int64_t x_stride, const float* factors, int64_t begin, int64_t end,
                   QuantisedRows& to);
  // Panels [begin, end).
  void (*multiply)(const PackedMatrix& matrix, const QuantisedRows& x, const Epilogue& epilogue, const ProductRows& y,
                   int64_t begin, int64_t end);
};

FASTFF_DECLARE_TILE_TABLES(LinearKernels, linear);

}  // namespace fastff
