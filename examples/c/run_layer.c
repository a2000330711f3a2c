/* Runs a layer that `fastff.save` wrote, without Python.
 *
 *   run_layer LAYER.safetensors [ROWS.txt]
 *
 * ROWS (or standard input) holds numbers in text, in_features to a row. Prints the leaf that a row reaches in each
 * tree, then its out_features outputs, a line to a row. */
#include <ctype.h>
#include <errno.h>
#include <fastff.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"

enum { BLOCK_ROWS = 256, LONGEST_NUMBER = 1023 };

static int fail(const char* what, const char* why) {
  fprintf(stderr, "run_layer: %s: %s\n", what, why);
  return 0;
}

/* The metadata's whole number from `low` to `high`. */
static int read_integer(const st_file* file, const char* key, long long low, long long high, long long* value) {
  const char* text = st_metadata(file, key);
  char* end;
  if (!text) return fail(key, "missing in the metadata: not a layer that fastff.save wrote?");
  errno = 0;
  *value = strtoll(text, &end, 10);
  if (errno || end == text || *end || *value < low || *value > high) return fail(key, "has an impossible value");
  return 1;
}

/* The position of the metadata's value in `names`, a list that ends with NULL. */
static int read_name(const st_file* file, const char* key, const char* const* names, int32_t* value) {
  const char* text = st_metadata(file, key);
  if (!text) return fail(key, "missing in the metadata");
  for (*value = 0; names[*value]; ++*value)
    if (strcmp(text, names[*value]) == 0) return 1;
  return fail(key, "has an unknown value");
}

static int read_tree(const st_file* file, fastff_tree* tree, int32_t* weights) {
  static const char* const activations[] = {"gelu", "gelu_tanh", "relu", "silu", "identity", "swiglu", "abs", NULL};
  static const char* const gates[] = {"none", "boundary", "boundary_min", NULL};
  static const char* const truths[] = {"false", "true", NULL};
  static const char* const quantizations[] = {"none", "bf16", "int8", NULL}; /* enum fastff_weights */
  const char *format = st_metadata(file, "format"), *tau = st_metadata(file, "tau");
  long long version, in, out, trees, leaf_width, depth;
  char* end;
  if (!format || strcmp(format, "fastff") != 0) return fail("format", "is not fastff: write the file with fastff.save");
  if (!read_integer(file, "version", 1, 1, &version) || !read_integer(file, "in_features", 1, INT_MAX, &in) ||
      !read_integer(file, "out_features", 1, INT_MAX, &out) || !read_integer(file, "trees", 1, INT_MAX, &trees) ||
      !read_integer(file, "leaf_width", 1, INT_MAX, &leaf_width) || !read_integer(file, "depth", 0, 24, &depth) ||
      !read_name(file, "node_output", truths, &tree->node_output) ||
      !read_name(file, "activation", activations, &tree->activation) || !read_name(file, "gate", gates, &tree->gate) ||
      !read_name(file, "quantization", quantizations, weights))
    return 0;
  if (!tau) return fail("tau", "missing in the metadata");
  tree->tau = strtod(tau, &end);
  if (end == tau || *end) return fail("tau", "is not a number");
  tree->in_features = in;
  tree->out_features = out;
  tree->trees = trees;
  tree->leaf_width = leaf_width;
  tree->depth = (int32_t)depth;
  return 1;
}

/* The weights of that name: float32, and of this shape (2 or 3 dimensions; columns 0 for 2). */
static const float* read_weights(const st_file* file, const char* name, int64_t trees, int64_t rows, int64_t columns) {
  const st_tensor* t = st_find(file, name);
  char text[128];
  if (!t) return fail(name, "missing"), NULL;
  if (strcmp(t->dtype, "F32") != 0) {
    snprintf(text, sizeof text, "is %s, this program reads F32: save layer.float()", t->dtype);
    return fail(name, text), NULL;
  }
  if (t->dimensions != (columns ? 3 : 2) || t->shape[0] != trees || t->shape[1] != rows ||
      (columns && t->shape[2] != columns)) {
    snprintf(text, sizeof text, columns ? "is not of shape (%lld, %lld, %lld)" : "is not of shape (%lld, %lld)",
             (long long)trees, (long long)rows, (long long)columns);
    return fail(name, text), NULL;
  }
  return t->data;
}

/* Checks the file's tensors against the tree that its metadata describes, and packs them. */
static fastff_packed* load_layer(const char* path, fastff_tree* tree) {
  char error[ST_ERROR_SIZE];
  st_file* file = st_open(path, error);
  fastff_packed* packed = NULL;
  int32_t weights;
  if (!file) return fail(path, error), NULL;
  if (read_tree(file, tree, &weights)) {
    const int64_t leaves = INT64_C(1) << tree->depth, nodes = leaves - 1;
    const int64_t neurons = leaves * tree->leaf_width, pair = tree->activation == FASTFF_SWIGLU ? 2 : 1;
    const int64_t in_rows = nodes + neurons * pair, out_rows = (tree->node_output ? nodes : 0) + neurons;
    const int has_b_in = st_find(file, "b_in") != NULL, has_b_out = st_find(file, "b_out") != NULL;
    const float* w_in = read_weights(file, "w_in", tree->trees, in_rows, tree->in_features);
    const float* w_out = w_in ? read_weights(file, "w_out", tree->trees, out_rows, tree->out_features) : NULL;
    const float* b_in = w_out && has_b_in ? read_weights(file, "b_in", tree->trees, in_rows, 0) : NULL;
    const float* b_out =
        w_out && has_b_out ? read_weights(file, "b_out", tree->trees, leaves, tree->out_features) : NULL;
    if (w_out && (b_in || !has_b_in) && (b_out || !has_b_out) &&
        fastff_pack_f32(tree, w_in, b_in, w_out, b_out, weights, &packed) != FASTFF_OK)
      fail(path, fastff_error());
  }
  st_close(file); /* the pack is a copy */
  return packed;
}

/* Reads a word of at most LONGEST_NUMBER characters: 1, 0 at the end of the file, or -1. */
static int read_word(FILE* stream, char* word) {
  int c, n = 0;
  do c = getc(stream);
  while (isspace(c));
  for (; c != EOF && !isspace(c); c = getc(stream)) {
    if (n == LONGEST_NUMBER) return word[40] = 0, fail(word, "begins a number of more than 1023 characters"), -1;
    word[n++] = (char)c;
  }
  word[n] = 0;
  return n > 0;
}

/* Reads up to BLOCK_ROWS rows; their number, or -1. */
static int read_rows(FILE* stream, float* x, int64_t in_features) {
  int64_t n = 0;
  char word[LONGEST_NUMBER + 1], *end;
  int found = 1;
  while (n < BLOCK_ROWS * in_features && (found = read_word(stream, word)) > 0) {
    x[n++] = strtof(word, &end);
    if (*end) return fail(word, "is not a number"), -1;
  }
  if (found < 0) return -1;
  if (ferror(stream)) return fail("rows", "cannot be read"), -1;
  if (n % in_features) return fail("rows", "the last one is not complete"), -1;
  return (int)(n / in_features);
}

static void print_row(const fastff_tree* tree, const int64_t* leaf, const float* y) {
  int64_t i;
  for (i = 0; i < tree->trees; ++i) printf("%lld ", (long long)leaf[i]);
  for (i = 0; i < tree->out_features; ++i) printf("%.9g%c", y[i], i + 1 < tree->out_features ? ' ' : '\n');
}

static int run(const fastff_tree* tree, const fastff_packed* packed, FILE* rows) {
  float* x = malloc(BLOCK_ROWS * (size_t)tree->in_features * sizeof *x);
  float* y = malloc(BLOCK_ROWS * (size_t)tree->out_features * sizeof *y);
  int64_t* leaf = malloc(BLOCK_ROWS * (size_t)tree->trees * sizeof *leaf);
  int n = 1, i;
  if (!x || !y || !leaf) {
    fail("rows", "out of memory");
    n = -1;
  }
  while (n > 0 && (n = read_rows(rows, x, tree->in_features)) > 0) {
    if (fastff_forward_packed_f32(packed, x, n, y, leaf, NULL, 0) != FASTFF_OK) {
      fail("fastff", fastff_error());
      n = -1;
    }
    for (i = 0; i < n; ++i) print_row(tree, leaf + i * tree->trees, y + i * tree->out_features);
    if (fflush(stdout) || ferror(stdout)) {
      fail("standard output", strerror(errno));
      n = -1;
    }
  }
  free(x);
  free(y);
  free(leaf);
  return n == 0;
}

int main(int count, char** arguments) {
  fastff_tree tree = {0};
  fastff_packed* packed;
  FILE* rows;
  int fine;
  if (count < 2 || count > 3) {
    fprintf(stderr, "usage: run_layer LAYER.safetensors [ROWS.txt]\n");
    return 2;
  }
  if (fastff_abi_version() != FASTFF_ABI_VERSION) return fail("fastff", "library and header do not match"), 1;
  packed = load_layer(arguments[1], &tree);
  if (!packed) return 1;
  rows = count == 3 ? fopen(arguments[2], "r") : stdin;
  fine = rows ? run(&tree, packed, rows) : fail(arguments[2], "cannot be opened");
  if (rows && rows != stdin) fclose(rows);
  fastff_packed_free(packed);
  return fine ? 0 : 1;
}
