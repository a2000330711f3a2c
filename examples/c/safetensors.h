/* A small reader of safetensors files that trusts nothing in them.
 *
 * A file is 8 bytes of header length (little endian), a JSON object, and the tensors' bytes. The object holds, for each
 * tensor, {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, and "__metadata__", an object of strings.
 * Source of the format: https://github.com/huggingface/safetensors
 */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

enum { ST_MOST_DIMENSIONS = 8, ST_ERROR_SIZE = 256 };

typedef struct st_tensor {
  char* name;
  char dtype[8]; /* "F32", "BF16", ... */
  int dimensions;
  int64_t shape[ST_MOST_DIMENSIONS];
  const void* data; /* aligned to its elements */
  int64_t bytes;
} st_tensor;

typedef struct st_file st_file;

/* The file, read whole into memory, or NULL with the reason in `error`. Every tensor it then has lies within the file,
 * has as many bytes as its shape and dtype say, and is aligned. Free with st_close. */
st_file* st_open(const char* path, char error[ST_ERROR_SIZE]);

/* The tensor of that name, or NULL. */
const st_tensor* st_find(const st_file* file, const char* name);

/* The metadata's value for that key, or NULL. */
const char* st_metadata(const st_file* file, const char* key);

void st_close(st_file* file); /* NULL is allowed */

#endif
