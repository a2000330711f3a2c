/* fastff: whole models on the CPU. The C ABI beside fastff.h; needs neither Python nor torch.
 *
 * Every function returns FASTFF_OK or an error whose text fastff_error() gives (per thread, until the next call).
 * threads: at most how many work on the call; 0 or less means fastff_processors().
 */
#ifndef FASTFF_MODEL_H
#define FASTFF_MODEL_H

#include <stdint.h>

#include "fastff.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Dense products in 8 bits ----
 *
 * A matrix is a caller's memory of fastff_matrix_bytes(), aligned to 64 bytes, that fastff_matrix_pack_f32 fills:
 * unsigned bytes with one fp32 scale to an output row, in panels of 64 output rows. */
typedef struct fastff_matrix {
  int64_t out_features; /* of y: 1 to 2^31 - 1 */
  int64_t in_features;  /* 1 to 131072 */
  int32_t gated;        /* not 0: every output is silu(gate) * value of two rows */
} fastff_matrix;

/* Memory of a matrix in bytes; 0 for a shape that cannot be. */
FASTFF_API int64_t fastff_matrix_bytes(const fastff_matrix* matrix);

/* weights: [out_features][in_features]; of a gated matrix all gates, then all values. */
FASTFF_API int32_t fastff_matrix_pack_f32(const fastff_matrix* matrix, const float* weights, void* packed);

/* y [rows][out_features] = act(x [rows][in_features] weights^T + bias).
 * bias: [out_features], twice as many for a gated matrix, or NULL. activation: enum fastff_activation, of a gated matrix
 * FASTFF_SWIGLU. bits: 8 or 16, to which a row of x is rounded with one scale. add: not 0 adds to what y holds. A row's
 * bits depend neither on the rows beside it nor on the number of threads. */
FASTFF_API int32_t fastff_matrix_multiply_f32(const fastff_matrix* matrix, const void* packed, const float* x,
                                              int64_t rows, const float* bias, int32_t activation, int32_t bits,
                                              int32_t add, float* y, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
