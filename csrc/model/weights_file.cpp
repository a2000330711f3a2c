#include "model/weights_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "base/bf16.h"
#include "base/checks.h"

namespace fastff {
namespace {

constexpr char kMagic[] = "fastffM1";
constexpr int64_t kPreamble = 24, kMostHeader = int64_t{1} << 28;

struct OpenFile {
  int descriptor;
  ~OpenFile() { close(descriptor); }
};

uint64_t fnv1a(const char* data, int64_t size) {
  uint64_t hash = 14695981039346656037ull;
  for (int64_t i = 0; i < size; ++i) hash = (hash ^ static_cast<uint8_t>(data[i])) * 1099511628211ull;
  return hash;
}

uint64_t word_at(const char* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

void read_all(int descriptor, char* to, int64_t size, const std::string& path) {
  for (int64_t done = 0; done < size;) {
    const ssize_t got = pread(descriptor, to + done, size - done, done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) refuse(path + " cannot be read: " + (got ? std::strerror(errno) : "it became shorter"));
    done += got;
  }
}

std::string written(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

int64_t product(const std::vector<int64_t>& shape) {
  int64_t all = 1;
  for (int64_t n : shape) {
    if (n > 0 && all > kMaxSize / n) refuse("a tensor of " + written(shape) + " is larger than a file can be");
    all *= n;
  }
  return all;
}

MatrixForm form_of(const std::string& name, const std::string& type) {
  static const char* const kTypes[] = {"int8", "int8-groups", "int4", "int4-least", "int8-groups64"};  // in the order of MatrixForm
  for (int i = 0; i < 5; ++i)
    if (type == kTypes[i]) return static_cast<MatrixForm>(i);
  refuse("tensor " + name + " is " + type + ", expected int8, int8-groups, int8-groups64, int4 or int4-least");
}

}  // namespace

WeightsFile::WeightsFile(const std::string& path, bool map) {
  open(path, map);
  try {
    read_header();
  } catch (const std::invalid_argument& e) {
    refuse(path + ": " + e.what());
  }
}

void WeightsFile::Unmap::operator()(void* pages) const { munmap(pages, bytes); }

void WeightsFile::open(const std::string& path, bool map) {
  const OpenFile file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  struct stat facts;
  if (file.descriptor < 0 || fstat(file.descriptor, &facts) != 0) refuse(path + " cannot be read: " + std::strerror(errno));
  if (!S_ISREG(facts.st_mode)) refuse(path + " is not a file");
  size_ = facts.st_size;
  if (size_ < kPreamble) refuse(path + " is too short for a model: " + std::to_string(size_) + " bytes");
  if (map) {
    void* const pages = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.descriptor, 0);
    if (pages == MAP_FAILED) refuse(path + " cannot be mapped: " + std::strerror(errno));
    mapped_ = std::unique_ptr<void, Unmap>(pages, Unmap{size_});
    madvise(pages, size_, MADV_WILLNEED);
    data_ = static_cast<const char*>(pages);
  } else {
    copy_ = std::make_unique<HugeBuffer>(size_);
    read_all(file.descriptor, copy_->data(), size_, path);
    data_ = copy_->data();
  }
}

void WeightsFile::read_header() {
  if (std::memcmp(data_, kMagic, 8) != 0) refuse("not a model of fastff, or of another version: no fastffM1 at its start");
  const uint64_t header = word_at(data_ + 8);
  if (header > static_cast<uint64_t>(std::min(kMostHeader, size_ - kPreamble)))
    refuse("a header of " + std::to_string(header) + " bytes does not fit the file of " + std::to_string(size_));
  const auto bytes = static_cast<int64_t>(header);
  if (fnv1a(data_ + kPreamble, bytes) != word_at(data_ + 16)) refuse("the header's checksum does not match: it is damaged");
  header_ = Json::parse(data_ + kPreamble, bytes);
}

bool WeightsFile::has(const std::string& name) const { return header_.member("tensors").find(name) != nullptr; }

const Json& WeightsFile::tensor(const std::string& name, const std::vector<int64_t>& shape) const {
  const Json* found = header_.member("tensors").find(name);
  if (!found) refuse("tensor " + name + " is missing");
  std::vector<int64_t> seen;
  for (const Json& item : found->member("shape").items()) seen.push_back(item.as_integer(name, 0, kMaxSize));
  if (seen != shape) refuse("tensor " + name + " is " + written(seen) + ", expected " + written(shape));
  return *found;
}

const char* WeightsFile::place(const std::string& name, const Json& tensor, int64_t bytes) const {
  const int64_t offset = tensor.integer("offset", 0, kMaxSize);
  if (offset % kLine != 0) refuse("tensor " + name + " at byte " + std::to_string(offset) + " is not aligned to 64");
  if (bytes > size_ || offset > size_ - bytes)
    refuse("tensor " + name + " of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
           " ends beyond the file of " + std::to_string(size_));
  return data_ + offset;
}

PackedMatrix WeightsFile::matrix(const std::string& name, int64_t out_features, int64_t in_features, bool gated) const {
  const Json& found = tensor(name, {out_features, in_features});
  if (found.flag("gated") != gated) refuse("tensor " + name + (gated ? " is not gated" : " is gated"));
  PackedMatrix shape{nullptr, out_features, in_features, gated, form_of(name, found.text("type"))};
  check_matrix(shape);
  shape.data = reinterpret_cast<const uint8_t*>(place(name, found, shape.bytes()));
  return shape;
}

const float* WeightsFile::numbers(const std::string& name, const std::vector<int64_t>& shape) const {
  const Json& found = tensor(name, shape);
  if (found.text("type") != "f32") refuse("tensor " + name + " is " + found.text("type") + ", expected f32");
  return reinterpret_cast<const float*>(place(name, found, product(shape) * static_cast<int64_t>(sizeof(float))));
}

Floats WeightsFile::widened(const std::string& name, const std::vector<int64_t>& shape) const {
  const Json& found = tensor(name, shape);
  if (found.text("type") == "f32") return Floats(numbers(name, shape));
  if (found.text("type") != "bf16") refuse("tensor " + name + " is " + found.text("type") + ", expected f32 or bf16");
  const int64_t n = product(shape);
  const auto* from = reinterpret_cast<const Bf16*>(place(name, found, n * static_cast<int64_t>(sizeof(Bf16))));
  std::vector<float> wide(n);
  for (int64_t i = 0; i < n; ++i) wide[i] = to_float(from[i]);
  return Floats(std::move(wide));
}

}  // namespace fastff
