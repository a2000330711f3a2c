/* fastff: conditional feedforward layers on the CPU. The C ABI; needs neither Python nor torch.
 *
 * A layer has `trees` binary trees of `depth` decisions. Routing nodes lie in heap order (children 2k+1 left, 2k+2 right),
 * `2^depth - 1` to a tree, followed by `2^depth` leaves of `leaf_width` neurons. A row's score at a node is
 * <x, w_in[node]> + b_in[node]; above zero it turns right, else (zero, negative, NaN) left.
 *
 * Arrays are dense and row-major:
 *   w_in  [trees][in_rows][in_features]    in_rows = nodes + leaves * leaf_width * (2 for swiglu: gates, then values)
 *   b_in  [trees][in_rows]                 or NULL
 *   w_out [trees][out_rows][out_features]  out_rows = (node_output ? nodes : 0) + leaves * leaf_width
 *   b_out [trees][leaves][out_features]    or NULL; only with node_output = 0
 *   x     [rows][in_features]      y [rows][out_features]
 *   leaf  [rows][trees]            leaf index reached, int64
 *   margin[rows]                   smallest |score| of the row's decisions; infinity without any
 *   scores[rows][trees][depth + in rows of a leaf]
 * Arrays must be aligned to their elements; outputs must not overlap inputs or each other. Optional outputs may be NULL.
 * What can be checked is checked: sizes, NULL, alignment, overlap and the leaves given to a backward.
 *
 * threads: at most how many work on the call (1024 and more are the same); 0 or less means fastff_processors().
 * rows: 0 to 2^31 - 1.
 *
 * Every function returns FASTFF_OK or an error whose text fastff_error() gives (per thread, until the next call).
 * Source of the layer: Belcak & Wattenhofer 2023, arXiv:2308.14711 and arXiv:2311.10770.
 */
#ifndef FASTFF_H
#define FASTFF_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FASTFF_API __attribute__((visibility("default")))
#else
#define FASTFF_API
#endif

#define FASTFF_ABI_VERSION 3

enum fastff_status {
  FASTFF_OK = 0,
  FASTFF_BAD_ARGUMENT = 1,
  FASTFF_OUT_OF_MEMORY = 2,
  FASTFF_BAD_ISA = 3,
  FASTFF_STALE = 4,
  FASTFF_INTERNAL = 5 /* what should not happen: a fault of this library or of the host's thread pool */
};

enum fastff_activation {
  FASTFF_GELU = 0,      /* x * Phi(x), exact */
  FASTFF_GELU_TANH = 1, /* the tanh approximation */
  FASTFF_RELU = 2,
  FASTFF_SILU = 3,
  FASTFF_IDENTITY = 4,
  FASTFF_SWIGLU = 5, /* leaves only: silu(gate) * value; needs node_output = 0 */
  FASTFF_ABS = 6     /* abs(x) */
};

enum fastff_gate {
  FASTFF_UNGATED = 0,
  FASTFF_BOUNDARY = 1,    /* each ancestor multiplies what hangs below it by tanh(|score| / tau) */
  FASTFF_BOUNDARY_MIN = 2, /* the least of those factors alone */
  FASTFF_NORMALISED = 3    /* of routers that choose several: sigmoid(score) over the sum of the chosen, times their number */
};

/* How a pack stores weights. */
enum fastff_weights {
  FASTFF_F32 = 0,
  FASTFF_BF16 = 1, /* bfloat16, rounded to nearest even */
  FASTFF_INT8 = 2  /* 8 bits, one fp32 scale to a row (largest |weight| / 127) */
};

typedef struct fastff_tree {
  int64_t in_features;
  int64_t out_features;
  int64_t trees;
  int64_t leaf_width;
  int32_t depth; /* decisions from root to leaf, 0 to 24 */
  int32_t node_output;
  int32_t activation; /* enum fastff_activation */
  int32_t gate;       /* enum fastff_gate */
  double tau;         /* score units; read only with a gate */
} fastff_tree;

/* A copy of a layer's weights laid out for inference; opaque. */
typedef struct fastff_packed fastff_packed;

/* The host's thread pool: call range(b, e, context) on disjoint pieces that cover [begin, end). Returns 0 on success. */
typedef void (*fastff_range)(int64_t begin, int64_t end, void* context);
typedef int32_t (*fastff_parallel_for)(int64_t begin, int64_t end, int64_t grain, fastff_range range, void* context);

FASTFF_API int32_t fastff_abi_version(void);

/* How many processors this process may use: those of its affinity mask, at most the whole ones of its control groups'
 * quotas (cgroup v1 and v2), at least 1. Found at the first call. */
FASTFF_API int32_t fastff_processors(void);

/* The message of this thread's last error, "" if the last call succeeded. Never NULL. */
FASTFF_API const char* fastff_error(void);

/* Name of the instruction set in use: scalar, avx2, avx512, avx512dot (with VNNI and BF16), amx (avx512dot with
 * tiles of int8) or neon. Chosen at load;
 * FASTFF_ISA in the environment forces one. */
FASTFF_API const char* fastff_isa(void);

/* Use another instruction set from now on. FASTFF_BAD_ISA if it is unknown or this CPU lacks it. Not thread-safe. */
FASTFF_API int32_t fastff_set_isa(const char* name);

/* Run on the host's pool instead of fastff's own; NULL returns to fastff's own. Not thread-safe. */
FASTFF_API void fastff_set_parallel_for(fastff_parallel_for parallel_for);

FASTFF_API int32_t fastff_forward_f32(const fastff_tree* tree, const float* w_in, const float* b_in, const float* w_out,
                                      const float* b_out, const float* x, int64_t rows, float* y, int64_t* leaf,
                                      float* margin, float* scores, int32_t threads);
FASTFF_API int32_t fastff_forward_f64(const fastff_tree* tree, const double* w_in, const double* b_in,
                                      const double* w_out, const double* b_out, const double* x, int64_t rows,
                                      double* y, int64_t* leaf, double* margin, double* scores, int32_t threads);

/* Gradients of sum(y * grad_y), from `leaf` and `scores` of the forward. Every grad_ output is written whole; a NULL one
 * is not computed. grad_b_in and grad_b_out have the shapes of b_in and b_out. */
FASTFF_API int32_t fastff_backward_f32(const fastff_tree* tree, const float* w_in, const float* w_out,
                                       const float* b_out, const float* x, const float* grad_y, int64_t rows,
                                       const int64_t* leaf, const float* scores, float* grad_x, float* grad_w_in,
                                       float* grad_b_in, float* grad_w_out, float* grad_b_out, int32_t threads);
FASTFF_API int32_t fastff_backward_f64(const fastff_tree* tree, const double* w_in, const double* w_out,
                                       const double* b_out, const double* x, const double* grad_y, int64_t rows,
                                       const int64_t* leaf, const double* scores, double* grad_x, double* grad_w_in,
                                       double* grad_b_in, double* grad_w_out, double* grad_b_out, int32_t threads);

/* Which rows of w_in, w_out and b_out rows with these leaves visit: their numbers, counted over all trees, in ascending
 * order. w_in_rows has room for [trees * in_rows], w_out_rows for [trees * out_rows], b_out_rows for [trees * leaves];
 * NULL is not written. counts[3]: how many of each. */
FASTFF_API int32_t fastff_visited(const fastff_tree* tree, const int64_t* leaf, int64_t rows, int64_t* w_in_rows,
                                  int64_t* w_out_rows, int64_t* b_out_rows, int64_t* counts);

/* As fastff_backward, but grad_w_in, grad_w_out and grad_b_out hold only the rows that fastff_visited names, in its order:
 * nothing is written, or zeroed, for the others. */
FASTFF_API int32_t fastff_backward_visited_f32(const fastff_tree* tree, const float* w_in, const float* w_out,
                                               const float* b_out, const float* x, const float* grad_y, int64_t rows,
                                               const int64_t* leaf, const float* scores, float* grad_x,
                                               float* grad_w_in, float* grad_b_in, float* grad_w_out,
                                               float* grad_b_out, int32_t threads);
FASTFF_API int32_t fastff_backward_visited_f64(const fastff_tree* tree, const double* w_in, const double* w_out,
                                               const double* b_out, const double* x, const double* grad_y,
                                               int64_t rows, const int64_t* leaf, const double* scores,
                                               double* grad_x, double* grad_w_in, double* grad_b_in,
                                               double* grad_w_out, double* grad_b_out, int32_t threads);

/* How a forward would cut its work. */
typedef struct fastff_plan {
  int32_t threads;         /* pieces of rows worked on at once */
  int32_t sorted_levels;   /* levels passed before rows are sorted by the subtree they reached; 0: not sorted */
  int64_t block_rows;      /* rows taken through all trees before the next rows */
  int32_t pair_at_least;   /* rows of a node from which two levels are scored in one pass */
  int32_t lockstep_below;  /* rows of a node below which its rows walk down together */
} fastff_plan;

/* The plan of a forward of so many rows. weights: enum fastff_weights. */
FASTFF_API int32_t fastff_plan_forward(const fastff_tree* tree, int32_t weights, int64_t rows, int32_t threads,
                                       fastff_plan* plan);

/* Copy weights into one buffer in which the rows of a neuron lie side by side, on huge pages where the system has them.
 * weights: enum fastff_weights. A quantised pack decides as the fp32 layer does: it also keeps the routing
 * nodes' w_in in fp32 and computes a score again from it when quantisation could have changed the score's sign. A pack
 * never changes: for new weights make another, and free the old one when no thread uses it. */
FASTFF_API int32_t fastff_pack_f32(const fastff_tree* tree, const float* w_in, const float* b_in, const float* w_out,
                                   const float* b_out, int32_t weights, fastff_packed** packed);

/* Memory of the pack in bytes; 0 for NULL. */
FASTFF_API int64_t fastff_packed_bytes(const fastff_packed* packed);

/* Remember the 4 bytes at each place, and return FASTFF_STALE from every forward that finds others there: a cheap guard
 * against edits of the packed tensors that nobody announced. count: 0 (stop watching) to FASTFF_WATCHED; a NULL place is
 * passed over. The places must stay readable as long as they are watched. */
#define FASTFF_WATCHED 4
FASTFF_API int32_t fastff_packed_watch(fastff_packed* packed, const void* const* places, int32_t count);

/* A checksum of memory, at about the speed of reading it: any change of one byte changes it, other changes all but one in
 * 2^64. bytes: 0 or less gives a constant. Compare only values of one process. */
FASTFF_API uint64_t fastff_checksum(const void* data, int64_t bytes);

/* y on packed weights; the shortest way for a single row. */
FASTFF_API int32_t fastff_infer_f32(const fastff_packed* packed, const float* x, float* y, int64_t rows,
                                    int64_t threads);

/* The same, with the route. */
FASTFF_API int32_t fastff_forward_packed_f32(const fastff_packed* packed, const float* x, int64_t rows, float* y,
                                             int64_t* leaf, float* margin, int32_t threads);

/* NULL is allowed. */
FASTFF_API void fastff_packed_free(fastff_packed* packed);

/* ---- Routers: the leaves a row goes to, and a gate for each ----
 *
 * `leaf [rows][per_row]` counts leaves over all trees and is ascending in a row; `gate [rows][per_row]`. per_row is trees * chosen.
 * A score is <x, w> + b. A tie chooses the lower leaf, and a NaN score loses to every other.
 *
 * w [weight_rows][in_features] and b [weight_rows] or NULL: the nodes of every tree in heap order, or one row to a leaf.
 * Product keys: w [2][candidates][in_features / 2], the first half for the first half of x.
 * What is compared is sigmoid(score) + balance, or without balance the score, whose order is that of its sigmoid; a gate
 * never sees balance. FASTFF_PATHS: balance [trees][nodes + leaves] in heap order (the root's is not read); FASTFF_FLAT and
 * FASTFF_PRODUCT_KEYS: [leaves]; FASTFF_TREES: NULL.
 */
enum fastff_router_kind {
  FASTFF_TREES = 0,       /* each tree's leaf, score > 0 turns right; gates as of fastff_tree */
  FASTFF_PATHS = 1,       /* of each tree the `chosen` best leaves that a beam of as many nodes a level finds; a leaf's
                             score is the sum along its path of +score where it turns right and -score where left */
  FASTFF_FLAT = 2,        /* the `chosen` best of `candidates` leaves */
  FASTFF_PRODUCT_KEYS = 3 /* the `chosen` best of candidates^2 leaves: leaf a * candidates + b scores first[a] + second[b] */
};

typedef struct fastff_router {
  int64_t in_features;
  int64_t trees;      /* 1 for FASTFF_FLAT and FASTFF_PRODUCT_KEYS */
  int64_t candidates; /* 0 for trees and paths */
  int64_t chosen;     /* 1 for FASTFF_TREES */
  int32_t kind;       /* enum fastff_router_kind */
  int32_t depth;      /* 0 to 24; 0 for FASTFF_FLAT and FASTFF_PRODUCT_KEYS */
  int32_t gate;       /* enum fastff_gate. FASTFF_TREES: all but FASTFF_NORMALISED; else it or FASTFF_UNGATED */
  int32_t reserved;   /* 0 */
  double tau;         /* score units; read only with a boundary gate */
} fastff_router;

/* A copy of a router's weights laid out for inference; opaque. */
typedef struct fastff_packed_router fastff_packed_router;

/* scores, or NULL: what a backward needs. FASTFF_TREES: [rows][trees][depth], those of the path; else [rows][per_row], each
 * chosen leaf's, without balance. */
FASTFF_API int32_t fastff_route_f32(const fastff_router* router, const float* w, const float* b, const float* balance,
                                    const float* x, int64_t rows, int64_t* leaf, float* gate, float* scores,
                                    int32_t threads);
FASTFF_API int32_t fastff_route_f64(const fastff_router* router, const double* w, const double* b,
                                    const double* balance, const double* x, int64_t rows, int64_t* leaf, double* gate,
                                    double* scores, int32_t threads);

/* weights: enum fastff_weights. FASTFF_BF16 and FASTFF_INT8 both route in 16 bits: few enough to halve the memory that is
 * read, enough to decide. What 16 bits leave in doubt is computed again from the fp32 rows, which the pack keeps: leaves are
 * those of FASTFF_F32. */
FASTFF_API int32_t fastff_router_pack_f32(const fastff_router* router, const float* w, const float* b,
                                          const float* balance, int32_t weights, fastff_packed_router** packed);
FASTFF_API int32_t fastff_router_infer_f32(const fastff_packed_router* packed, const float* x, int64_t rows,
                                           int64_t* leaf, float* gate, int32_t threads);
/* Memory of the pack in bytes; 0 for NULL. */
FASTFF_API int64_t fastff_router_bytes(const fastff_packed_router* packed);
/* NULL is allowed. */
FASTFF_API void fastff_router_free(fastff_packed_router* packed);

/* Advise the system to use huge pages where they fit wholly into this memory. For a large fresh output before its first
 * write: faulting in its small pages one by one can take as long as the layer. Advice: changes no content, never fails. */
FASTFF_API void fastff_advise_huge_pages(void* data, int64_t bytes);

/* ---- conditional matrix multiplication, for a router of the caller's own ----
 *
 * Every row multiplies only the leaves that were chosen for it:
 *   y[r] = sum over s of gate[r][s] * (act(x[r] w_in[leaf[r][s]]^T + b_in[leaf[r][s]]) w_out[leaf[r][s]] + b_out[leaf[r][s]])
 *
 *   w_in  [leaves][in_rows][in_features]      in_rows = leaf_width * (2 for swiglu: gates, then values)
 *   b_in  [leaves][in_rows]                   or NULL
 *   w_out [leaves][leaf_width][out_features]
 *   b_out [leaves][out_features]              or NULL
 *   leaf  [rows][k]    int64, 0 to leaves - 1; the same leaf twice in a row counts twice
 *   gate  [rows][k]    any number; what is not finite stays in its row
 *   scores[rows][k][in_rows]    x w_in^T + b_in, which a backward needs
 *
 * k = 0 gives zeros. A row's sums run over its leaves in ascending order, equal ones in the order of their slots: its bits
 * depend neither on the rows beside it nor on the number of threads. rows * k is at most 2^31 - 1. */
typedef struct fastff_leaves {
  int64_t in_features;
  int64_t out_features;
  int64_t leaves;
  int64_t leaf_width;
  int32_t activation; /* enum fastff_activation */
} fastff_leaves;

/* scores may be NULL. */
FASTFF_API int32_t fastff_conditional_forward_f32(const fastff_leaves* leaves, const float* w_in, const float* b_in,
                                                  const float* w_out, const float* b_out, const float* x,
                                                  const int64_t* leaf, const float* gate, int64_t rows, int64_t k,
                                                  float* y, float* scores, int32_t threads);
FASTFF_API int32_t fastff_conditional_forward_f64(const fastff_leaves* leaves, const double* w_in, const double* b_in,
                                                  const double* w_out, const double* b_out, const double* x,
                                                  const int64_t* leaf, const double* gate, int64_t rows, int64_t k,
                                                  double* y, double* scores, int32_t threads);

/* Gradients of sum(y * grad_y), from `scores` of the forward, in time that the chosen leaves alone determine. Every grad_
 * output has the shape of what it is the gradient of and is written whole, the rows of leaves that nobody chose with zeros;
 * a NULL one is not computed. */
FASTFF_API int32_t fastff_conditional_backward_f32(const fastff_leaves* leaves, const float* w_in, const float* w_out,
                                                   const float* b_out, const float* x, const int64_t* leaf,
                                                   const float* gate, const float* grad_y, int64_t rows, int64_t k,
                                                   const float* scores, float* grad_x, float* grad_gate,
                                                   float* grad_w_in, float* grad_b_in, float* grad_w_out,
                                                   float* grad_b_out, int32_t threads);
FASTFF_API int32_t fastff_conditional_backward_f64(const fastff_leaves* leaves, const double* w_in, const double* w_out,
                                                   const double* b_out, const double* x, const int64_t* leaf,
                                                   const double* gate, const double* grad_y, int64_t rows, int64_t k,
                                                   const double* scores, double* grad_x, double* grad_gate,
                                                   double* grad_w_in, double* grad_b_in, double* grad_w_out,
                                                   double* grad_b_out, int32_t threads);

/* A copy of leaves laid out for inference; opaque. */
typedef struct fastff_packed_leaves fastff_packed_leaves;

/* weights: enum fastff_weights. With FASTFF_BF16 x and the activations are rounded to bfloat16 too; with FASTFF_INT8 a row of
 * x is rounded to 8 bits and a row's activations to 16, with one scale each. */
FASTFF_API int32_t fastff_conditional_pack_f32(const fastff_leaves* leaves, const float* w_in, const float* b_in,
                                               const float* w_out, const float* b_out, int32_t weights,
                                               fastff_packed_leaves** packed);

/* Memory of the pack in bytes; 0 for NULL. */
FASTFF_API int64_t fastff_conditional_packed_bytes(const fastff_packed_leaves* packed);

/* y on packed weights. Memory for intermediate results is kept by the calling thread from call to call. */
FASTFF_API int32_t fastff_conditional_infer_f32(const fastff_packed_leaves* packed, const float* x, const int64_t* leaf,
                                                const float* gate, int64_t rows, int64_t k, float* y, int32_t threads);

/* NULL is allowed. */
FASTFF_API void fastff_conditional_packed_free(fastff_packed_leaves* packed);

/* ---- A router and its leaves as one layer ---- */

/* Packed weights of both; opaque. */
typedef struct fastff_layer fastff_layer;

/* The arguments of fastff_router_pack and fastff_conditional_pack; the leaves are as many as the router's, of its
 * in_features. weights: enum fastff_weights, of both. */
FASTFF_API int32_t fastff_layer_pack_f32(const fastff_router* router, const float* w, const float* b,
                                         const float* balance, const fastff_leaves* leaves, const float* w_in,
                                         const float* b_in, const float* w_out, const float* b_out, int32_t weights,
                                         fastff_layer** layer);
/* y [rows][out_features] of x [rows][in_features]. Allocates nothing once the calling thread has seen as many rows. */
FASTFF_API int32_t fastff_layer_infer_f32(const fastff_layer* layer, const float* x, float* y, int64_t rows,
                                          int32_t threads);
/* Memory of the layer in bytes; 0 for NULL. */
FASTFF_API int64_t fastff_layer_bytes(const fastff_layer* layer);
/* NULL is allowed. */
FASTFF_API void fastff_layer_free(fastff_layer* layer);

#ifdef __cplusplus
}
#endif
#endif
