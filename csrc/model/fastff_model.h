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

/* ---- Dense products in 8 and 4 bits ----
 *
 * A matrix is a caller's memory of fastff_matrix_bytes(), aligned to 64 bytes, that fastff_matrix_pack_f32 or
 * fastff_matrix_pack_blocks fills, in panels of 64 output rows. */
enum fastff_matrix_form {
  FASTFF_ROWS_8 = 0,        /* 8 bits, one fp32 scale to an output row */
  FASTFF_GROUPS_8 = 1,      /* 8 bits, a scale in half precision to every 32 inputs of an output row: GGUF's Q8_0 */
  FASTFF_GROUPS_4 = 2,      /* 4 bits likewise: Q4_0 */
  FASTFF_GROUPS_4_LEAST = 3, /* 4 bits with a minimum beside the scale: Q4_1 */
  FASTFF_LONG_GROUPS_8 = 4   /* 8 bits, a scale in half precision to every 64 inputs */
};

typedef struct fastff_matrix {
  int64_t out_features; /* of y: 1 to 2^31 - 1 */
  int64_t in_features;  /* 1 to 131072 */
  int32_t gated;        /* not 0: every output is silu(gate) * value of two rows */
  int32_t form;         /* enum fastff_matrix_form */
} fastff_matrix;

/* Memory of a matrix in bytes; 0 for a shape that cannot be. */
FASTFF_API int64_t fastff_matrix_bytes(const fastff_matrix* matrix);

/* weights: [out_features][in_features]; of a gated matrix all gates, then all values. */
FASTFF_API int32_t fastff_matrix_pack_f32(const fastff_matrix* matrix, const float* weights, void* packed);

/* The same from GGUF's blocks of the matrix's form, which is one of those with 32 inputs to a scale, [rows of weights][in_features / 32], whose numbers and scales are kept.
 * in_features is a multiple of 32. */
FASTFF_API int32_t fastff_matrix_pack_blocks(const fastff_matrix* matrix, const void* blocks, void* packed);

/* y [rows][out_features] = act(x [rows][in_features] weights^T + bias).
 * bias: [out_features], twice as many for a gated matrix, or NULL. activation: enum fastff_activation, of a gated matrix
 * FASTFF_SWIGLU. bits: 8 or 16, to which a row of x is rounded with one scale. add: not 0 adds to what y holds. A row's
 * bits depend neither on the rows beside it nor on the number of threads. */
FASTFF_API int32_t fastff_matrix_multiply_f32(const fastff_matrix* matrix, const void* packed, const float* x,
                                              int64_t rows, const float* bias, int32_t activation, int32_t bits,
                                              int32_t add, float* y, int32_t threads);

/* ---- A bound of engines that read their weights once ----
 *
 * Reads memory with one core as fast as it can, in `streams` parts (1 to 16) side by side: the time of the call is the
 * measure. bytes: a multiple of 256 * streams. sum: of its words. */
FASTFF_API int32_t fastff_read_memory(const void* data, int64_t bytes, int64_t streams, uint64_t* sum);

/* ---- Decoders ----
 *
 * A model is immutable: any number of sessions of it may run in threads of their own. A session is a conversation, its
 * tokens, their keys and values; one thread at a time may use it, another is refused. Tokens are numbers below vocab_size. */
typedef struct fastff_model fastff_model;
typedef struct fastff_session fastff_session;

typedef struct fastff_model_facts {
  int64_t vocab_size;
  int64_t positions; /* at most, of a session */
  int64_t hidden;
  int64_t layers;
  int64_t bytes; /* of the file */
} fastff_model_facts;

/* Opens a file that `fastff export --to native` wrote. map: 0 copies it to huge pages; else its pages are shared with other
 * processes, and it must not be cut while the model lives. FASTFF_BAD_ARGUMENT for a file that is missing, damaged or of
 * another version. */
FASTFF_API int32_t fastff_model_open(const char* path, int32_t map, fastff_model** model);
FASTFF_API int32_t fastff_model_describe(const fastff_model* model, fastff_model_facts* facts);
/* NULL is allowed. No session of the model may live. */
FASTFF_API void fastff_model_free(fastff_model* model);

/* capacity: positions the session can hold. Refused if their cache exceeds the machine's memory. */
FASTFF_API int32_t fastff_session_new(const fastff_model* model, int64_t capacity, fastff_session** session);
/* Tokens read so far; 0 for NULL. */
FASTFF_API int64_t fastff_session_length(const fastff_session* session);
/* Forgets all but the first `length` tokens. */
FASTFF_API int32_t fastff_session_rewind(fastff_session* session, int64_t length);
/* Reads tokens after those read so far. logits: NULL, or [count][vocab_size] for what each of them predicts; without it only
 * the last one's prediction is computed. Nothing is read if a token is not of the vocabulary or they do not fit. */
FASTFF_API int32_t fastff_session_feed(fastff_session* session, const int32_t* ids, int64_t count, float* logits,
                                       int32_t threads);

typedef struct fastff_sampling {
  float temperature; /* 0: the likeliest token */
  float top_p;       /* above 0, to 1: the likeliest tokens whose probabilities reach it; 1: all */
  int64_t top_k;     /* the likeliest tokens; 0: all */
} fastff_sampling;

/* Seed of the session's random numbers; a new session has seed 0. */
FASTFF_API int32_t fastff_session_seed(fastff_session* session, uint64_t seed);
/* Draws the next token from what the last one read predicts. Does not read it. */
FASTFF_API int32_t fastff_session_sample(fastff_session* session, const fastff_sampling* sampling, int32_t* id);
/* NULL is allowed. */
FASTFF_API void fastff_session_free(fastff_session* session);

/* ---- Encoders ----
 *
 * Immutable: any number of threads may call fastff_encoder_run at once. */
typedef struct fastff_encoder fastff_encoder;

typedef struct fastff_encoder_facts {
  int64_t vocab_size;
  int64_t positions; /* tokens of a sequence at most */
  int64_t types;     /* segments; 0 for a model without */
  int64_t hidden;
  int64_t layers;
  int64_t bytes; /* of the file */
} fastff_encoder_facts;

/* Opens a file that `fastff export --to native` wrote of an encoder. map: 0 copies it to huge pages; else its pages are shared
 * with other processes, and it must not be cut while the encoder lives. FASTFF_BAD_ARGUMENT for a file that is missing,
 * damaged or of another kind. */
FASTFF_API int32_t fastff_encoder_open(const char* path, int32_t map, fastff_encoder** encoder);
FASTFF_API int32_t fastff_encoder_describe(const fastff_encoder* encoder, fastff_encoder_facts* facts);
/* hidden [tokens][hidden] of sequences that lie end to end, without padding: lengths [sequences], each at least 1, sum to
 * tokens. ids [tokens]; types [tokens], or NULL for all of the first segment. With dense feedforwards a sequence's bits
 * depend neither on the sequences beside it nor on the number of threads. */
FASTFF_API int32_t fastff_encoder_run(const fastff_encoder* encoder, const int32_t* ids, const int32_t* types,
                                      const int64_t* lengths, int64_t sequences, float* hidden, int32_t threads);
/* NULL is allowed. */
FASTFF_API void fastff_encoder_free(fastff_encoder* encoder);

#ifdef __cplusplus
}
#endif

#endif
