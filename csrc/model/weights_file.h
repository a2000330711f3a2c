// A model's weights in one file, mapped read-only or read into memory.
//
//   bytes 0 to 7    "fastffM1"
//   bytes 8 to 15   size of the header in bytes, little-endian like all numbers
//   bytes 16 to 23  FNV-1a checksum of the header, 64 bits
//   header          JSON: {"model": {...}, "tensors": {name: {"type", "shape", "offset", "gated"}}}
//   tensors         at their offsets from the file's start, multiples of 64
//
// Types: "f32" and "bf16", row by row; "int8", "int8-groups", "int8-groups64", "int4" and "int4-least", a matrix in one of the layouts of
// model/linear.h of shape [out_features, in_features], gated or not. Everything is checked against the file's size before it is used.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/huge_pages.h"
#include "model/json.h"
#include "model/linear.h"

namespace fastff {

// Numbers in fp32: those of the file itself, or a copy of what it holds in another type. Null data: none.
class Floats {
 public:
  Floats() = default;
  explicit Floats(const float* of_file) : data_(of_file) {}
  explicit Floats(std::vector<float> copy) : copy_(std::move(copy)), data_(copy_.data()) {}

  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

class WeightsFile {
 public:
  // map: share the file's pages instead of a copy on huge pages. A mapped file must not be cut while it is in use. Throws
  // std::invalid_argument for a file that cannot be read or is not such a file.
  WeightsFile(const std::string& path, bool map);
  WeightsFile(const WeightsFile&) = delete;
  WeightsFile& operator=(const WeightsFile&) = delete;

  const Json& model() const { return header_.member("model"); }
  int64_t bytes() const { return size_; }
  bool has(const std::string& name) const;

  // Each throws std::invalid_argument, naming the tensor, for one that is missing or of another type or shape.
  PackedMatrix matrix(const std::string& name, int64_t out_features, int64_t in_features, bool gated = false) const;
  const float* numbers(const std::string& name, const std::vector<int64_t>& shape) const;
  // "f32" or "bf16", as fp32.
  Floats widened(const std::string& name, const std::vector<int64_t>& shape) const;

 private:
  void open(const std::string& path, bool map);
  void read_header();
  const Json& tensor(const std::string& name, const std::vector<int64_t>& shape) const;
  const char* place(const std::string& name, const Json& tensor, int64_t bytes) const;

  struct Unmap {
    int64_t bytes;
    void operator()(void* pages) const;
  };

  int64_t size_ = 0;
  const char* data_ = nullptr;
  std::unique_ptr<void, Unmap> mapped_;
  std::unique_ptr<HugeBuffer> copy_;
  Json header_;
};

}  // namespace fastff
