// The small part of JSON that a file's header needs: read whole, with limits, into values.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastff {

class Json {
 public:
  // Throws std::invalid_argument for what is not JSON, or nested deeper than 16.
  static Json parse(const char* text, size_t size);

  // A member of an object. Each throws std::invalid_argument naming what is missing or of another kind.
  const Json& member(const std::string& name) const;
  const Json* find(const std::string& name) const;  // null where there is none
  int64_t integer(const std::string& name, int64_t low, int64_t high) const;
  double number(const std::string& name) const;
  std::string text(const std::string& name) const;
  bool flag(const std::string& name) const;

  const std::vector<std::pair<std::string, Json>>& members() const { return members_; }
  const std::vector<Json>& items() const { return items_; }
  int64_t as_integer(const std::string& name, int64_t low, int64_t high) const;  // name: for the message

 private:
  enum class Kind { kNull, kFlag, kNumber, kText, kList, kObject };
  friend class JsonReader;

  const Json& of_kind(const std::string& name, Kind kind, const char* called) const;

  Kind kind_ = Kind::kNull;
  double number_ = 0;  // or 0 and 1 of a flag
  std::string text_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};

}  // namespace fastff
