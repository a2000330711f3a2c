#include "safetensors.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_HEADER (100 * 1000 * 1000)    /* the format's own limit, in bytes */
#define MOST_ENTRIES 2048                /* names are compared each with each */
#define MOST_VALUE (INT64_C(1) << 46)    /* of a length or an offset: no sum or product of two sizes overflows below */

typedef struct st_pair {
  char* key;
  char* value;
} st_pair;

struct st_file {
  char* header;
  unsigned char* data;
  int64_t data_bytes;
  st_tensor* tensors;
  size_t tensor_count;
  st_pair* metadata;
  size_t metadata_count;
};

/* Where the parser stands. Every function below that returns int returns 1, or 0 with `error` set. */
typedef struct parser {
  const char* at;
  const char* begin;
  const char* end;
  st_file* file;
  char* error;
} parser;

static int fail(char* error, const char* format, ...) {
  va_list arguments;
  char* c;
  va_start(arguments, format);
  vsnprintf(error, ST_ERROR_SIZE, format, arguments);
  va_end(arguments);
  for (c = error; *c; ++c) /* names come from the file and must not command a terminal */
    if ((unsigned char)*c < 32 || *c == 127) *c = '?';
  return 0;
}

static int fail_at(parser* p, const char* expected) {
  return fail(p->error, "header is not valid: expected %s at byte %ld", expected, (long)(p->at - p->begin));
}

static void skip_space(parser* p) {
  while (p->at < p->end && (*p->at == ' ' || *p->at == '\t' || *p->at == '\n' || *p->at == '\r')) ++p->at;
}

static int next_is(parser* p, char c) {
  skip_space(p);
  if (p->at == p->end || *p->at != c) return 0;
  ++p->at;
  return 1;
}

static int expect(parser* p, char c) {
  const char text[] = {'\'', c, '\'', 0};
  return next_is(p, c) || fail_at(p, text);
}

static int escaped(parser* p, char* to) {
  static const char names[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
  const char* found;
  if (p->at == p->end) return fail_at(p, "an escape");
  if (*p->at == 'u') { /* writers escape control characters only; other text stands as UTF-8 */
    unsigned code = 0;
    if (strspn(p->at + 1, "0123456789abcdefABCDEF") < 4 || sscanf(p->at + 1, "%4x", &code) != 1 || !code || code > 127)
      return fail_at(p, "an ASCII escape");
    p->at += 5;
    *to = (char)code;
    return 1;
  }
  found = memchr(names, *p->at, sizeof names - 1);
  if (!found) return fail_at(p, "an escape");
  *to = meant[found - names];
  ++p->at;
  return 1;
}

/* A string of its own memory, which the caller frees. */
static int parse_string(parser* p, char** string) {
  const char* start;
  char* to;
  if (!expect(p, '"')) return 0;
  start = p->at;
  while (start < p->end && *start != '"') start += (*start == '\\' && start + 1 < p->end) ? 2 : 1;
  *string = to = malloc((size_t)(start - p->at) + 1); /* escapes only shorten */
  if (!to) return fail(p->error, "out of memory");
  while (p->at < p->end && *p->at != '"') {
    const char c = *p->at++;
    if (c == '\\') {
      if (!escaped(p, to)) break;
    } else if ((unsigned char)c < 32) {
      --p->at;
      fail_at(p, "no control character");
      break;
    } else {
      *to = c;
    }
    ++to;
  }
  *to = 0;
  if (!p->error[0] && expect(p, '"')) return 1;
  free(*string);
  *string = NULL;
  return 0;
}

static int parse_integer(parser* p, int64_t* value) {
  skip_space(p);
  if (p->at == p->end || *p->at < '0' || *p->at > '9') return fail_at(p, "a natural number");
  for (*value = 0; p->at < p->end && *p->at >= '0' && *p->at <= '9'; ++p->at) {
    *value = *value * 10 + (*p->at - '0');
    if (*value > MOST_VALUE) return fail_at(p, "a smaller number");
  }
  return 1;
}

/* [1, 2, 3], at most `most` of them. */
static int parse_integers(parser* p, int64_t* values, int most, int* count) {
  *count = 0;
  if (!expect(p, '[')) return 0;
  if (next_is(p, ']')) return 1;
  do {
    if (*count == most) return fail_at(p, "fewer numbers");
    if (!parse_integer(p, &values[(*count)++])) return 0;
  } while (next_is(p, ','));
  return expect(p, ']');
}

/* Room for one more element, zeroed; NULL with an error if there is none. A list is full whenever its length is zero or
 * a power of two. */
static void* one_more(parser* p, void* list, size_t count, size_t size) {
  char* grown = list;
  if (count == MOST_ENTRIES) {
    fail(p->error, "header has more than %d entries", MOST_ENTRIES);
    return NULL;
  }
  if ((count & (count - 1)) == 0) grown = realloc(list, (count ? 2 * count : 1) * size);
  if (!grown) {
    fail(p->error, "out of memory");
    return NULL;
  }
  memset(grown + count * size, 0, size);
  return grown;
}

static int parse_metadata(parser* p) {
  st_file* f = p->file;
  if (!expect(p, '{')) return 0;
  if (next_is(p, '}')) return 1;
  do {
    st_pair* pairs = one_more(p, f->metadata, f->metadata_count, sizeof *pairs);
    st_pair* pair;
    if (!pairs) return 0;
    f->metadata = pairs;
    pair = &pairs[f->metadata_count++];
    if (!parse_string(p, &pair->key) || !expect(p, ':') || !parse_string(p, &pair->value)) return 0;
  } while (next_is(p, ','));
  return expect(p, '}');
}

static int64_t element_bytes(const char* dtype) {
  static const struct {
    const char* name;
    int64_t bytes;
  } known[] = {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4},
               {"I16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}, {"U64", 8}, {"U32", 4}, {"U16", 2}};
  size_t i;
  for (i = 0; i < sizeof known / sizeof *known; ++i)
    if (strcmp(dtype, known[i].name) == 0) return known[i].bytes;
  return 0;
}

/* Checks what a tensor says of itself against the file, and finds its data. */
static int place(parser* p, st_tensor* t, const int64_t* offsets) {
  const int64_t element = element_bytes(t->dtype);
  int64_t bytes = element;
  int i;
  if (!element) return fail(p->error, "tensor %.60s has the dtype %s, which is not known", t->name, t->dtype);
  for (i = 0; i < t->dimensions; ++i) {
    if (t->shape[i] && bytes > MOST_VALUE / t->shape[i])
      return fail(p->error, "tensor %.60s is larger than can be addressed", t->name);
    bytes *= t->shape[i];
  }
  if (offsets[0] > offsets[1] || offsets[1] > p->file->data_bytes)
    return fail(p->error, "tensor %.60s lies at bytes %lld to %lld, the file has %lld", t->name, (long long)offsets[0],
                (long long)offsets[1], (long long)p->file->data_bytes);
  if (offsets[1] - offsets[0] != bytes)
    return fail(p->error, "tensor %.60s has %lld bytes, its shape and dtype need %lld", t->name,
                (long long)(offsets[1] - offsets[0]), (long long)bytes);
  if (offsets[0] % element) return fail(p->error, "tensor %.60s is not aligned to its elements", t->name);
  t->data = p->file->data + offsets[0];
  t->bytes = bytes;
  return 1;
}

static int parse_tensor(parser* p, st_tensor* t) {
  int64_t offsets[2];
  int seen = 0, offset_count = 0;
  if (!expect(p, '{')) return 0;
  do {
    char *key = NULL, *dtype = NULL;
    int fine = parse_string(p, &key) && expect(p, ':');
    if (fine && strcmp(key, "dtype") == 0) {
      fine = parse_string(p, &dtype);
      if (fine) snprintf(t->dtype, sizeof t->dtype, "%s", dtype);
      free(dtype);
      seen |= 1;
    } else if (fine && strcmp(key, "shape") == 0) {
      fine = parse_integers(p, t->shape, ST_MOST_DIMENSIONS, &t->dimensions);
      seen |= 2;
    } else if (fine && strcmp(key, "data_offsets") == 0) {
      fine = parse_integers(p, offsets, 2, &offset_count);
      seen |= offset_count == 2 ? 4 : 0;
    } else if (fine) {
      fine = fail(p->error, "tensor %.60s has an unknown field %.60s", t->name, key);
    }
    free(key);
    if (!fine) return 0;
  } while (next_is(p, ','));
  if (!expect(p, '}')) return 0;
  if (seen != 7) return fail(p->error, "tensor %.60s lacks its dtype, shape or two data_offsets", t->name);
  return place(p, t, offsets);
}

static int parse_entry(parser* p) {
  st_file* f = p->file;
  char* name = NULL;
  st_tensor* tensors;
  if (!parse_string(p, &name)) return 0;
  if (!expect(p, ':') || strcmp(name, "__metadata__") == 0) {
    free(name);
    return !p->error[0] && parse_metadata(p);
  }
  if (st_find(f, name)) {
    fail(p->error, "tensor %.60s is there twice", name);
    free(name);
    return 0;
  }
  tensors = one_more(p, f->tensors, f->tensor_count, sizeof *tensors);
  if (!tensors) {
    free(name);
    return 0;
  }
  f->tensors = tensors;
  tensors[f->tensor_count].name = name;
  return parse_tensor(p, &tensors[f->tensor_count++]);
}

static int parse_header(parser* p) {
  if (!expect(p, '{')) return 0;
  if (!next_is(p, '}')) {
    do {
      if (!parse_entry(p)) return 0;
    } while (next_is(p, ','));
    if (!expect(p, '}')) return 0;
  }
  skip_space(p);
  return p->at == p->end || fail_at(p, "the end");
}

static int64_t file_bytes(FILE* stream) {
  long end;
  if (fseek(stream, 0, SEEK_END) || (end = ftell(stream)) < 0 || fseek(stream, 0, SEEK_SET)) return -1;
  return end;
}

static int read_file(st_file* f, FILE* stream, char* error) {
  const int64_t bytes = file_bytes(stream);
  unsigned char length[8];
  uint64_t header = 0;
  parser p;
  int i;
  if (bytes >= 0 && bytes < 8) return fail(error, "has %lld bytes, a header's length alone has 8", (long long)bytes);
  if (bytes < 0 || fread(length, 1, 8, stream) != 8) return fail(error, "cannot be read");
  for (i = 7; i >= 0; --i) header = header << 8 | length[i];
  if (header > MOST_HEADER || header > (uint64_t)bytes - 8)
    return fail(error, "its header says that it has %llu bytes, the file has %lld after it", (unsigned long long)header,
                (long long)bytes - 8);
  f->data_bytes = bytes - 8 - (int64_t)header;
  f->header = malloc((size_t)header + 1);
  f->data = malloc((size_t)f->data_bytes + 1);
  if (!f->header || !f->data) return fail(error, "out of memory");
  f->header[header] = 0;
  if (fread(f->header, 1, (size_t)header, stream) != header ||
      fread(f->data, 1, (size_t)f->data_bytes, stream) != (size_t)f->data_bytes)
    return fail(error, "ended while it was read");
  p.at = p.begin = f->header;
  p.end = f->header + header;
  p.file = f;
  p.error = error;
  return parse_header(&p);
}

st_file* st_open(const char* path, char error[ST_ERROR_SIZE]) {
  FILE* stream = fopen(path, "rb");
  st_file* f = calloc(1, sizeof *f);
  int fine;
  error[0] = 0;
  fine = stream && f ? read_file(f, stream, error) : fail(error, "cannot be opened");
  if (stream) fclose(stream);
  if (fine) return f;
  st_close(f);
  return NULL;
}

const st_tensor* st_find(const st_file* file, const char* name) {
  size_t i;
  for (i = 0; i < file->tensor_count; ++i)
    if (strcmp(file->tensors[i].name, name) == 0) return &file->tensors[i];
  return NULL;
}

const char* st_metadata(const st_file* file, const char* key) {
  size_t i;
  for (i = 0; i < file->metadata_count; ++i)
    if (strcmp(file->metadata[i].key, key) == 0) return file->metadata[i].value;
  return NULL;
}

void st_close(st_file* file) {
  size_t i;
  if (!file) return;
  for (i = 0; i < file->tensor_count; ++i) free(file->tensors[i].name);
  for (i = 0; i < file->metadata_count; ++i) {
    free(file->metadata[i].key);
    free(file->metadata[i].value);
  }
  free(file->tensors);
  free(file->metadata);
  free(file->header);
  free(file->data);
  free(file);
}
