// The C functions of dense products: checks of what a caller gives, then model/linear.h.
#include <algorithm>
#include <string>
#include <vector>

#include "base/checks.h"
#include "base/errors.h"
#include "base/huge_pages.h"
#include "model/fastff_model.h"
#include "model/linear.h"

namespace fastff {
namespace {

PackedMatrix checked(const fastff_matrix* matrix, const void* packed) {
  need(matrix != nullptr, "matrix is NULL");
  need_in("form", matrix->form, FASTFF_ROWS_8, FASTFF_LONG_GROUPS_8);
  const PackedMatrix shape{static_cast<const uint8_t*>(packed), matrix->out_features, matrix->in_features,
                           matrix->gated != 0, static_cast<MatrixForm>(matrix->form)};
  check_matrix(shape);
  return shape;
}

void need_packed(const void* packed) {
  need(packed != nullptr, "packed is NULL");
  need(reinterpret_cast<uintptr_t>(packed) % kLine == 0, "packed is not aligned to 64 bytes");
}

void check_call(const PackedMatrix& shape, const void* packed, const float* x, int64_t rows, const float* bias,
                int32_t activation, int32_t bits, float* y) {
  need_packed(packed);
  need_in("rows", rows, 0, kMaxRows);
  const auto widest = static_cast<double>(std::max(shape.in_features, shape.out_features));
  need(static_cast<double>(rows) * widest * sizeof(float) < kAddressable, "x or y is larger than memory can be");
  need(rows == 0 || (x != nullptr && y != nullptr), "x or y is NULL");
  need_in("activation", activation, FASTFF_GELU, FASTFF_ABS);
  need((activation == FASTFF_SWIGLU) == shape.gated, "activation FASTFF_SWIGLU goes with a gated matrix, others do not");
  if (bits != 8 && bits != 16) refuse("bits " + std::to_string(bits) + " is neither 8 nor 16");
  const Array y_array = array("y", y, rows * shape.out_features), x_array = array("x", x, rows * shape.in_features);
  const Array bias_array = array("bias", bias, bias ? shape.rows() : 0);
  need_aligned({x_array, y_array, bias_array});
  need_disjoint({y_array}, {x_array, bias_array, array("packed", shape.data, shape.bytes())});
}

}  // namespace
}  // namespace fastff

using namespace fastff;

int64_t fastff_matrix_bytes(const fastff_matrix* matrix) {
  int64_t bytes = 0;
  guarded([&] { bytes = checked(matrix, nullptr).bytes(); });
  return bytes;
}

int32_t fastff_matrix_pack_f32(const fastff_matrix* matrix, const float* weights, void* packed) {
  return guarded([&] {
    const PackedMatrix shape = checked(matrix, packed);
    need(weights != nullptr, "weights is NULL");
    need_packed(packed);
    const int64_t numbers = shape.rows() * shape.in_features;
    for (int64_t i = 0; i < numbers; ++i) need(weights[i] - weights[i] == 0, "weights hold NaN or infinity");
    pack_matrix(shape, weights, static_cast<uint8_t*>(packed));
  });
}

int32_t fastff_matrix_pack_blocks(const fastff_matrix* matrix, const void* blocks, void* packed) {
  return guarded([&] {
    const PackedMatrix shape = checked(matrix, packed);
    need(blocks != nullptr, "blocks is NULL");
    need_packed(packed);
    need(shape.grouped(), "form FASTFF_ROWS_8 has no blocks");
    pack_blocks(shape, static_cast<const uint8_t*>(blocks), static_cast<uint8_t*>(packed));
  });
}

int32_t fastff_matrix_multiply_f32(const fastff_matrix* matrix, const void* packed, const float* x, int64_t rows,
                                   const float* bias, int32_t activation, int32_t bits, int32_t add, float* y,
                                   int32_t threads) {
  return guarded([&] {
    const PackedMatrix shape = checked(matrix, packed);
    check_call(shape, packed, x, rows, bias, activation, bits, y);
    std::vector<float> arranged;
    if (bias) pack_bias(shape, bias, (arranged.resize(shape.panels() * kPanel), arranged.data()));
    QuantisedRows numbers;
    quantise_rows(x, shape.in_features, rows, shape.in_features, nullptr, bits, threads, numbers, shape.grouped());
    multiply(shape, numbers, {bias ? arranged.data() : nullptr, activation, add != 0}, {y, nullptr, shape.out_features},
             threads);
  });
}
