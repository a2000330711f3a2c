/* Checks the core without Python, where there is no torch: on emulated processors, under ThreadSanitizer.
 *
 *   check_core kernels   every instruction set that runs here, on random layers, against plain loops in double
 *   check_core threads   many threads on one pack
 *   check_core snapshots   sixteen readers of a layer whose pack a writer replaces
 *   check_core fork      a child of a process whose pool is at work
 *   check_core scarce    a system that gives no more threads
 *
 * Exits with 1 at the first failure. */
#define _GNU_SOURCE
#include <fastff.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(holds, ...) \
  do { \
    if (!(holds)) { \
      fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
      fprintf(stderr, __VA_ARGS__); \
      fprintf(stderr, " (%s, %s)\n", fastff_isa(), fastff_error()); \
      _exit(1); \
    } \
  } while (0)

enum { W_IN, B_IN, W_OUT, B_OUT, X, GRAD_Y, INPUTS };
enum { Y, SCORES, MARGIN, GRAD_X, GRAD_W_IN, GRAD_B_IN, GRAD_W_OUT, GRAD_B_OUT, RESULTS };

/* Inputs in both precisions; the doubles hold the floats' values. */
typedef struct layer {
  fastff_tree tree;
  int64_t rows, nodes, leaves, leaf_in_rows, in_rows, out_rows, path;
  int64_t sizes[INPUTS], result_sizes[RESULTS];
  double* d[INPUTS]; /* a bias that the layer lacks is NULL */
  float* f[INPUTS];
} layer;

typedef struct results {
  double* d[RESULTS];
  int64_t* leaf;
} results;

static uint64_t state = 88172645463325252u;
static uint64_t draw(void) {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}
static int64_t draw_in(int64_t low, int64_t high) { return low + (int64_t)(draw() % (uint64_t)(high - low + 1)); }
static double draw_normal(void) { /* near enough: the sum of twelve uniforms */
  double sum = -6;
  int i;
  for (i = 0; i < 12; ++i) sum += (double)(draw() >> 11) / 9007199254740992.0;
  return sum;
}

static void* room(int64_t bytes) {
  void* p = malloc((size_t)bytes + 1);
  CHECK(p, "out of memory");
  return p;
}

static layer make_layer(fastff_tree tree, int64_t rows, int bias) {
  layer l = {.tree = tree, .rows = rows};
  int64_t i;
  int k;
  const double scale[INPUTS] = {1 / sqrt((double)tree.in_features), 1, 1 / sqrt((double)tree.out_features), 1, 1, 1};
  l.leaves = INT64_C(1) << tree.depth;
  l.nodes = l.leaves - 1;
  l.leaf_in_rows = tree.leaf_width * (tree.activation == FASTFF_SWIGLU ? 2 : 1);
  l.in_rows = l.nodes + l.leaves * l.leaf_in_rows;
  l.out_rows = (tree.node_output ? l.nodes : 0) + l.leaves * tree.leaf_width;
  l.path = tree.depth + l.leaf_in_rows;
  l.sizes[W_IN] = l.result_sizes[GRAD_W_IN] = tree.trees * l.in_rows * tree.in_features;
  l.sizes[W_OUT] = l.result_sizes[GRAD_W_OUT] = tree.trees * l.out_rows * tree.out_features;
  l.sizes[B_IN] = l.result_sizes[GRAD_B_IN] = bias ? tree.trees * l.in_rows : 0;
  l.sizes[B_OUT] = bias && !tree.node_output ? tree.trees * l.leaves * tree.out_features : 0;
  l.result_sizes[GRAD_B_OUT] = l.sizes[B_OUT];
  l.sizes[X] = l.result_sizes[GRAD_X] = rows * tree.in_features;
  l.sizes[GRAD_Y] = l.result_sizes[Y] = rows * tree.out_features;
  l.result_sizes[SCORES] = rows * tree.trees * l.path;
  l.result_sizes[MARGIN] = rows;
  for (k = 0; k < INPUTS; ++k) {
    if ((k == B_IN || k == B_OUT) && !l.sizes[k]) continue;
    l.d[k] = room(l.sizes[k] * 8);
    l.f[k] = room(l.sizes[k] * 4);
    for (i = 0; i < l.sizes[k]; ++i) l.d[k][i] = l.f[k][i] = (float)(draw_normal() * scale[k]);
  }
  return l;
}

static layer draw_layer(void) {
  static const int64_t odd_widths[] = {1, 2, 3, 4, 5, 15, 16, 17, 63, 65, 128, 131, 300};
  static const int64_t rows[] = {0, 1, 2, 3, 5, 9, 40, 300};
  fastff_tree t = {0};
  t.in_features = odd_widths[draw_in(0, 12)];
  t.out_features = odd_widths[draw_in(0, 12)];
  t.depth = (int32_t)draw_in(0, 6);
  t.trees = draw_in(1, 3);
  t.leaf_width = draw_in(1, 9);
  t.node_output = (int32_t)draw_in(0, 1);
  do {
    t.activation = (int32_t)draw_in(FASTFF_GELU, FASTFF_ABS);
  } while (t.activation == FASTFF_SWIGLU && t.node_output);
  t.gate = (int32_t)draw_in(FASTFF_UNGATED, FASTFF_BOUNDARY_MIN);
  t.tau = 0.7;
  return make_layer(t, rows[draw_in(0, 7)], (int)draw_in(0, 1));
}

static void free_layer(layer* l) {
  int k;
  for (k = 0; k < INPUTS; ++k) {
    free(l->d[k]);
    free(l->f[k]);
  }
}

static results make_results(const layer* l) {
  results r;
  int k;
  for (k = 0; k < RESULTS; ++k) r.d[k] = memset(room(l->result_sizes[k] * 8), 0, (size_t)l->result_sizes[k] * 8);
  r.leaf = room(l->rows * l->tree.trees * 8);
  return r;
}

static void free_results(results* r) {
  int k;
  for (k = 0; k < RESULTS; ++k) free(r->d[k]);
  free(r->leaf);
}

/* The reference: one row, one element at a time; `narrow` rounds every sum to fp32. */
static double rounded(double v, int narrow) { return narrow ? (double)(float)v : v; }

static double score(const layer* l, int64_t tree, int64_t row, const double* x, int narrow) {
  const double* w = l->d[W_IN] + (tree * l->in_rows + row) * l->tree.in_features;
  double sum = 0;
  int64_t i;
  for (i = 0; i < l->tree.in_features; ++i) sum = rounded(sum + rounded(w[i] * x[i], narrow), narrow);
  return l->d[B_IN] ? rounded(sum + l->d[B_IN][tree * l->in_rows + row], narrow) : sum;
}

static void add_row(const layer* l, const double* row, double factor, double* y, int narrow) {
  int64_t i;
  for (i = 0; i < l->tree.out_features; ++i) y[i] = rounded(y[i] + rounded(factor * row[i], narrow), narrow);
}

static double activated(double s, int activation) {
  switch (activation) {
    case FASTFF_GELU: return s * 0.5 * erfc(-s * sqrt(0.5));
    case FASTFF_GELU_TANH: return 0.5 * s * (1 + tanh(sqrt(2 / acos(-1)) * (s + 0.044715 * s * s * s)));
    case FASTFF_RELU: return s > 0 ? s : 0;
    case FASTFF_IDENTITY: return s;
    case FASTFF_ABS: return fabs(s);
    default: return s / (1 + exp(-s));
  }
}

static void reference_tree(const layer* l, int64_t tree, const double* x, int narrow, double* y, int64_t* leaf,
                           double* margin) {
  const fastff_tree* t = &l->tree;
  const double* w_out = l->d[W_OUT] + tree * l->out_rows * t->out_features;
  const int64_t first = t->node_output ? l->nodes : 0; /* row of w_out of the first leaf */
  int64_t node = 0, j;
  double passed = 1;
  int level;
  for (level = 0; level < t->depth; ++level) {
    const double s = score(l, tree, node, x, narrow);
    *margin = fmin(*margin, fabs(s));
    if (t->node_output) add_row(l, w_out + node * t->out_features, passed * activated(s, t->activation), y, narrow);
    if (t->gate == FASTFF_BOUNDARY) passed *= tanh(fabs(s) / t->tau);
    if (t->gate == FASTFF_BOUNDARY_MIN) passed = fmin(passed, tanh(fabs(s) / t->tau));
    node = 2 * node + 1 + (s > 0);
  }
  *leaf = node - l->nodes;
  for (j = 0; j < t->leaf_width; ++j) {
    const int64_t row = l->nodes + *leaf * l->leaf_in_rows + j;
    const int64_t out = first + *leaf * t->leaf_width + j;
    double value = passed * activated(score(l, tree, row, x, narrow), t->activation);
    if (t->activation == FASTFF_SWIGLU) value *= score(l, tree, row + t->leaf_width, x, narrow);
    add_row(l, w_out + out * t->out_features, rounded(value, narrow), y, narrow);
  }
  if (l->d[B_OUT]) add_row(l, l->d[B_OUT] + (tree * l->leaves + *leaf) * t->out_features, passed, y, narrow);
}

static results reference(const layer* l, int narrow) {
  results r = make_results(l);
  int64_t i, t;
  for (i = 0; i < l->rows; ++i) {
    r.d[MARGIN][i] = HUGE_VAL;
    for (t = 0; t < l->tree.trees; ++t)
      reference_tree(l, t, l->d[X] + i * l->tree.in_features, narrow, r.d[Y] + i * l->tree.out_features,
                     r.leaf + i * l->tree.trees + t, r.d[MARGIN] + i);
  }
  return r;
}

static float* as_float(const double* from, int64_t n) {
  float* to = room(n * 4);
  int64_t i;
  for (i = 0; i < n; ++i) to[i] = (float)from[i];
  return to;
}

static results run_f64(const layer* l, int threads) {
  results r = make_results(l);
  double *const *in = l->d, **out = r.d;
  CHECK(!fastff_forward_f64(&l->tree, in[W_IN], in[B_IN], in[W_OUT], in[B_OUT], in[X], l->rows, out[Y], r.leaf,
                            out[MARGIN], out[SCORES], threads), "forward_f64");
  CHECK(!fastff_backward_f64(&l->tree, in[W_IN], in[W_OUT], in[B_OUT], in[X], in[GRAD_Y], l->rows, r.leaf, out[SCORES],
                             out[GRAD_X], out[GRAD_W_IN], in[B_IN] ? out[GRAD_B_IN] : NULL, out[GRAD_W_OUT],
                             in[B_OUT] ? out[GRAD_B_OUT] : NULL, threads), "backward_f64");
  return r;
}

static results run_f32(const layer* l, int threads) {
  results r = make_results(l);
  float *const *in = l->f, *out[RESULTS];
  int64_t i;
  int k;
  for (k = 0; k < RESULTS; ++k) out[k] = as_float(r.d[k], l->result_sizes[k]);
  CHECK(!fastff_forward_f32(&l->tree, in[W_IN], in[B_IN], in[W_OUT], in[B_OUT], in[X], l->rows, out[Y], r.leaf,
                            out[MARGIN], out[SCORES], threads), "forward_f32");
  CHECK(!fastff_backward_f32(&l->tree, in[W_IN], in[W_OUT], in[B_OUT], in[X], in[GRAD_Y], l->rows, r.leaf, out[SCORES],
                             out[GRAD_X], out[GRAD_W_IN], in[B_IN] ? out[GRAD_B_IN] : NULL, out[GRAD_W_OUT],
                             in[B_OUT] ? out[GRAD_B_OUT] : NULL, threads), "backward_f32");
  for (k = 0; k < RESULTS; ++k) {
    for (i = 0; i < l->result_sizes[k]; ++i) r.d[k][i] = out[k][i];
    free(out[k]);
  }
  return r;
}

static fastff_packed* pack(const layer* l, int32_t weights) {
  fastff_packed* packed = NULL;
  CHECK(!fastff_pack_f32(&l->tree, l->f[W_IN], l->f[B_IN], l->f[W_OUT], l->f[B_OUT], weights, &packed), "pack");
  return packed;
}

/* Only Y and the leaves. */
static results run_packed(const layer* l, int32_t weights, int threads) {
  results r = make_results(l);
  fastff_packed* packed = pack(l, weights);
  float *y = as_float(r.d[Y], l->result_sizes[Y]), *again = as_float(r.d[Y], l->result_sizes[Y]);
  int64_t i;
  CHECK(!fastff_forward_packed_f32(packed, l->f[X], l->rows, y, r.leaf, NULL, threads), "forward_packed");
  CHECK(!fastff_infer_f32(packed, l->f[X], again, l->rows, 1), "infer");
  CHECK(!memcmp(y, again, (size_t)l->result_sizes[Y] * 4), "other bits with another number of threads");
  for (i = 0; i < l->result_sizes[Y]; ++i) r.d[Y][i] = y[i];
  fastff_packed_free(packed);
  free(y);
  free(again);
  return r;
}

static double largest(const double* a, int64_t n) {
  double most = 1;
  int64_t i;
  for (i = 0; i < n; ++i) most = fmax(most, fabs(a[i]));
  return most;
}

static double difference(const double* a, const double* b, int64_t n) {
  double most = 0;
  int64_t i;
  for (i = 0; i < n; ++i) most = fabs(a[i] - b[i]) <= most ? most : fabs(a[i] - b[i]); /* NaN stays */
  return most;
}

/* The largest difference of y over the rows that no rounding of fp32 can turn; their leaves must agree. */
static double clear_difference(const layer* l, const results* got, const results* want) {
  const int64_t columns = l->tree.out_features, trees = l->tree.trees;
  double most = 0;
  int64_t i;
  for (i = 0; i < l->rows; ++i) {
    if (want->d[MARGIN][i] < 1e-3) continue;
    CHECK(!memcmp(got->leaf + i * trees, want->leaf + i * trees, (size_t)trees * 8), "row %lld's leaf", (long long)i);
    most = fmax(most, difference(got->d[Y] + i * columns, want->d[Y] + i * columns, columns));
  }
  return most;
}

static void check_gradients(const layer* l, const results* got, const results* want, double tolerance) {
  int k;
  for (k = GRAD_X; k < RESULTS; ++k) {
    const double error = difference(got->d[k], want->d[k], l->result_sizes[k]);
    CHECK(error <= tolerance * largest(want->d[k], l->result_sizes[k]), "gradient %d is off by %g", k - GRAD_X, error);
  }
}

static double loss(const layer* l) {
  results r = reference(l, 0);
  double sum = 0;
  int64_t i;
  for (i = 0; i < l->result_sizes[Y]; ++i) sum += r.d[Y][i] * l->d[GRAD_Y][i];
  free_results(&r);
  return sum;
}

/* The gradients against a difference of the reference's loss along a random direction. */
static void check_slope(layer* l, const results* r) {
  static const int inputs[] = {W_IN, B_IN, W_OUT, B_OUT, X};
  static const int grads[] = {GRAD_W_IN, GRAD_B_IN, GRAD_W_OUT, GRAD_B_OUT, GRAD_X};
  double slope = 0, size = 0, step = 1e-7, sides[2];
  int64_t i;
  int side, k;
  const uint64_t before = state;
  for (side = 0; side < 2; ++side) {
    state = before;
    for (k = 0; k < 5; ++k)
      for (i = 0; i < l->sizes[inputs[k]]; ++i) {
        const double direction = draw_normal(), part = direction * r->d[grads[k]][i];
        l->d[inputs[k]][i] += (side ? -2 : 1) * step * direction;
        slope += side ? 0 : part;
        size += side ? 0 : part * part;
      }
    sides[side] = loss(l);
  }
  for (k = 0; k < 5; ++k)
    for (i = 0; i < l->sizes[inputs[k]]; ++i) l->d[inputs[k]][i] = l->f[inputs[k]][i];
  slope -= (sides[0] - sides[1]) / (2 * step);
  CHECK(fabs(slope) <= 1e-5 * (1 + sqrt(size)), "the gradients miss the loss's slope by %g", slope);
}

/* tightest: the smallest margin; at 1e-4 and more a small step turns no row. */
static void check_isa(layer* l, const results* exact, double tightest, double rounding_error, results* scalar,
                      int threads) {
  results r = run_f64(l, threads), packed;
  const int64_t ys = l->result_sizes[Y], leaf_bytes = l->rows * l->tree.trees * 8;
  int k;
  CHECK(!memcmp(r.leaf, exact->leaf, (size_t)leaf_bytes), "f64 took another leaf");
  CHECK(difference(r.d[Y], exact->d[Y], ys) <= 1e-12 * largest(exact->d[Y], ys), "f64 y");
  if (l->tree.depth) CHECK(difference(r.d[MARGIN], exact->d[MARGIN], l->rows) <= 1e-12, "f64 margin");
  if (tightest > 1e-4 && l->tree.activation != FASTFF_RELU && l->tree.activation != FASTFF_ABS) check_slope(l, &r);
  if (!scalar->leaf) *scalar = r;
  else {
    check_gradients(l, &r, scalar, 1e-12);
    free_results(&r);
  }
  r = run_f32(l, threads);
  CHECK(clear_difference(l, &r, exact) <= 2 * rounding_error + 1e-6, "f32 y is off by %g", clear_difference(l, &r, exact));
  if (!memcmp(r.leaf, exact->leaf, (size_t)leaf_bytes)) check_gradients(l, &r, scalar, 2e-5);
  packed = run_packed(l, FASTFF_F32, threads);
  CHECK(!memcmp(packed.leaf, r.leaf, (size_t)leaf_bytes), "a packed layer took another leaf");
  CHECK(clear_difference(l, &packed, exact) <= 2 * rounding_error + 1e-6, "packed y");
  free_results(&packed);
  for (k = FASTFF_BF16; k <= FASTFF_INT8; ++k) {
    packed = run_packed(l, k, threads);
    CHECK(!memcmp(packed.leaf, r.leaf, (size_t)leaf_bytes), "quantised weights %d took another leaf", k);
    CHECK(difference(packed.d[Y], r.d[Y], ys) <= 0.05 * largest(r.d[Y], ys), "quantised y");
    free_results(&packed);
  }
  free_results(&r);
}

static void check_kernels(int layers) {
  static const char* const isas[] = {"scalar", "avx2", "avx512", "neon"};
  char checked[64] = "";
  int64_t rows = 0, clear = 0, i;
  int n, k;
  for (n = 0; n < layers; ++n) {
    layer l = draw_layer();
    results exact = reference(&l, 0), rounding = reference(&l, 1), scalar = {0};
    double rounding_error, tightest = HUGE_VAL;
    rows += l.rows;
    for (i = 0; i < l.rows; ++i) {
      const double margin = rounding.d[MARGIN][i] = exact.d[MARGIN][i];
      clear += margin >= 1e-3;
      tightest = fmin(tightest, margin);
    }
    rounding_error = clear_difference(&l, &rounding, &exact);
    for (k = 0; k < 4; ++k) {
      if (fastff_set_isa(isas[k]) != FASTFF_OK) continue;
      check_isa(&l, &exact, tightest, rounding_error, &scalar, 1 + n % 3);
      if (!n) strcat(strcat(checked, " "), isas[k]);
    }
    free_results(&exact);
    free_results(&rounding);
    free_results(&scalar);
    free_layer(&l);
  }
  CHECK(clear > rows / 2, "only %lld of %lld rows were compared", (long long)clear, (long long)rows);
  printf("kernels: %d layers, %lld rows,%s\n", layers, (long long)rows, checked);
}

/* For threads, fork, scarcity: one pack, whose answers are known. */
typedef struct shared {
  layer l;
  fastff_packed* packed;
  float* y; /* by one thread */
  volatile int stop;
} shared;

static shared make_shared(void) {
  const fastff_tree tree = {.in_features = 48, .out_features = 40, .trees = 2, .leaf_width = 2, .depth = 5,
                            .node_output = 1, .activation = FASTFF_GELU, .gate = FASTFF_UNGATED, .tau = 1};
  shared s = {.l = make_layer(tree, 200, 1)};
  s.packed = pack(&s.l, FASTFF_F32);
  s.y = room(s.l.result_sizes[Y] * 4);
  CHECK(!fastff_infer_f32(s.packed, s.l.f[X], s.y, s.l.rows, 1), "infer");
  return s;
}

static void free_shared(shared* s) {
  fastff_packed_free(s->packed);
  free(s->y);
  free_layer(&s->l);
}
/* Some of the rows with that many threads. */
static void infer_some(const shared* s, int64_t from, int64_t rows, int threads) {
  const int64_t in = s->l.tree.in_features, out = s->l.tree.out_features;
  float* y = room(rows * out * 4);
  CHECK(!fastff_infer_f32(s->packed, s->l.f[X] + from * in, y, rows, threads), "infer");
  CHECK(!memcmp(y, s->y + from * out, (size_t)(rows * out) * 4), "%lld rows gave other bits", (long long)rows);
  free(y);
}

static void* work(void* context) {
  const shared* s = context;
  int i;
  for (i = 0; i < 60; ++i) infer_some(s, i % 9, 191 - 3 * i, 1 + i % 4);
  return NULL;
}

static void* train(void* context) {
  const shared* s = context;
  int i;
  for (i = 0; i < 6; ++i) {
    results one = run_f32(&s->l, 3), two = run_f32(&s->l, 3);
    int k;
    for (k = 0; k < RESULTS; ++k)
      CHECK(!memcmp(one.d[k], two.d[k], (size_t)s->l.result_sizes[k] * 8), "result %d differs between two runs", k);
    free_results(&one);
    free_results(&two);
  }
  return NULL;
}

static void* work_until_stopped(void* context) {
  const shared* s = context;
  while (!s->stop) infer_some(s, 0, 200, 3);
  return NULL;
}

static void check_threads(void) {
  shared s = make_shared();
  pthread_t threads[6];
  int i;
  for (i = 0; i < 6; ++i) CHECK(!pthread_create(&threads[i], NULL, i < 4 ? work : train, &s), "pthread_create");
  for (i = 0; i < 6; ++i) pthread_join(threads[i], NULL);
  free_shared(&s);
  puts("threads: six callers");
}

/* A layer whose weights a writer replaces while readers evaluate it: packs never change, the current one is swapped whole
 * and the last reader of an old one frees it, as a program would do. The layers differ by a factor of w_out alone, so that
 * outputs of one pack are a known multiple of the first one's. */
enum { READERS = 16, VERSIONS = 40 };
typedef struct snapshot {
  fastff_packed* packed;
  int version, users;
} snapshot;
typedef struct published {
  const shared* s;
  pthread_mutex_t lock;
  snapshot* current;
} published;

static void release(published* p, snapshot* s) {
  int last;
  pthread_mutex_lock(&p->lock);
  last = --s->users == 0;
  pthread_mutex_unlock(&p->lock);
  if (!last) return;
  fastff_packed_free(s->packed);
  free(s);
}

static snapshot* taken(published* p) {
  snapshot* s;
  pthread_mutex_lock(&p->lock);
  s = p->current;
  ++s->users;
  pthread_mutex_unlock(&p->lock);
  return s;
}

/* A pack of w_out times 2^version: exact in fp32. */
static snapshot* make_snapshot(const layer* l, int version) {
  snapshot* s = room(sizeof *s);
  const int64_t n = l->sizes[W_OUT], m = l->sizes[B_OUT];
  float* w_out = room(n * 4);
  float* b_out = l->f[B_OUT] ? room(m * 4) : NULL;
  int64_t i;
  for (i = 0; i < n; ++i) w_out[i] = ldexpf(l->f[W_OUT][i], version);
  for (i = 0; b_out && i < m; ++i) b_out[i] = ldexpf(l->f[B_OUT][i], version);
  s->version = version;
  s->users = 1;
  CHECK(!fastff_pack_f32(&l->tree, l->f[W_IN], l->f[B_IN], w_out, b_out, FASTFF_F32, &s->packed), "pack");
  free(w_out);
  free(b_out);
  return s;
}

static void* write_snapshots(void* context) {
  published* p = context;
  int version;
  for (version = 1; version <= VERSIONS; ++version) {
    snapshot *fresh = make_snapshot(&p->s->l, version % 8), *old;
    pthread_mutex_lock(&p->lock);
    old = p->current;
    p->current = fresh;
    pthread_mutex_unlock(&p->lock);
    release(p, old);
  }
  return NULL;
}

static void* read_snapshots(void* context) {
  published* p = context;
  const int64_t rows = 50, n = rows * p->s->l.tree.out_features;
  float* y = room(n * 4);
  int i;
  for (i = 0; i < 60; ++i) {
    snapshot* s = taken(p);
    int64_t k;
    CHECK(!fastff_infer_f32(s->packed, p->s->l.f[X], y, rows, 1 + i % 3), "infer");
    for (k = 0; k < n; ++k)
      CHECK(y[k] == ldexpf(p->s->y[k], s->version), "an output of version %d is of another", s->version);
    release(p, s);
  }
  free(y);
  return NULL;
}

static void check_snapshots(void) {
  shared s = make_shared();
  published p = {.s = &s, .lock = PTHREAD_MUTEX_INITIALIZER};
  pthread_t threads[READERS + 1];
  int i;
  p.current = make_snapshot(&s.l, 0);
  for (i = 0; i <= READERS; ++i)
    CHECK(!pthread_create(&threads[i], NULL, i ? read_snapshots : write_snapshots, &p), "pthread_create");
  for (i = 0; i <= READERS; ++i) pthread_join(threads[i], NULL);
  release(&p, p.current);
  free_shared(&s);
  puts("snapshots: sixteen readers and a writer");
}

static void check_fork(void) {
  shared s = make_shared();
  pthread_t busy;
  int i, status;
  CHECK(!pthread_create(&busy, NULL, work_until_stopped, &s), "pthread_create");
  for (i = 0; i < 8; ++i) { /* at any moment of the other thread's call */
    const pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
      alarm(60); /* a child that waits for its parent's threads waits for ever */
      infer_some(&s, 0, 200, 3);
      infer_some(&s, 1, 100, 2);
      _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0, "a child ended with %d", status);
    infer_some(&s, 0, 200, 2);
  }
  s.stop = 1;
  pthread_join(busy, NULL);
  free_shared(&s);
  puts("fork: eight children");
}

static void check_scarce(void) {
  shared s = make_shared();
  struct rlimit limit;
  long pages = 0;
  FILE* statm = fopen("/proc/self/statm", "r");
  CHECK(statm && fscanf(statm, "%ld", &pages) == 1, "/proc/self/statm");
  fclose(statm);
  limit.rlim_cur = limit.rlim_max = (rlim_t)(pages * sysconf(_SC_PAGESIZE)) + (30 << 20); /* three stacks of 8 MB */
  CHECK(!setrlimit(RLIMIT_AS, &limit), "setrlimit");
  infer_some(&s, 0, 200, 12);
  free_shared(&s);
  puts("scarce: 12 threads asked for, few given");
}

int main(int count, char** arguments) {
  const char* mode = count > 1 ? arguments[1] : "";
  if (!strcmp(mode, "kernels")) check_kernels(count > 2 ? atoi(arguments[2]) : 60);
  else if (!strcmp(mode, "threads")) check_threads();
  else if (!strcmp(mode, "snapshots")) check_snapshots();
  else if (!strcmp(mode, "fork")) check_fork();
  else if (!strcmp(mode, "scarce")) check_scarce();
  else return fprintf(stderr, "usage: check_core kernels [LAYERS] | threads | snapshots | fork | scarce\n"), 2;
  return 0;
}
