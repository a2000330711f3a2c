#include "model/json.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <locale>
#include <sstream>

#include "base/checks.h"

namespace fastff {

class JsonReader {
 public:
  JsonReader(const char* text, size_t size) : text_(text, size) {}

  Json document() {
    Json value = any(0);
    skip_space();
    if (at_ != text_.size()) fail("something after its end");
    return value;
  }

 private:
  static constexpr int kDeepest = 16;

  [[noreturn]] void fail(const char* what) const {
    refuse("the header is not JSON: " + std::string(what) + " at byte " + std::to_string(at_));
  }
  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) && text_[at_]) ++at_;
  }
  char peek() {
    skip_space();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  void take(char wanted) {
    if (peek() != wanted) fail((std::string("no '") + wanted + "'").c_str());
    ++at_;
  }
  bool take_word(const char* word) {
    if (text_.compare(at_, std::strlen(word), word) != 0) return false;
    at_ += std::strlen(word);
    return true;
  }

  Json any(int depth) {
    if (depth > kDeepest) fail("nested too deeply");
    Json value;
    switch (peek()) {
      case '{': object(value, depth); break;
      case '[': list(value, depth); break;
      case '"':
        value.kind_ = Json::Kind::kText;
        value.text_ = string();
        break;
      default: word_or_number(value);
    }
    return value;
  }

  void object(Json& value, int depth) {
    value.kind_ = Json::Kind::kObject;
    take('{');
    if (peek() == '}') return take('}');
    for (;;) {
      skip_space();
      std::string name = string();
      take(':');
      value.members_.emplace_back(std::move(name), any(depth + 1));
      if (peek() != ',') return take('}');
      take(',');
    }
  }

  void list(Json& value, int depth) {
    value.kind_ = Json::Kind::kList;
    take('[');
    if (peek() == ']') return take(']');
    for (;;) {
      value.items_.push_back(any(depth + 1));
      if (peek() != ',') return take(']');
      take(',');
    }
  }

  std::string string() {
    take('"');
    std::string result;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') fail("an escaped character, which names here do not need,");
      result += text_[at_++];
    }
    take('"');
    return result;
  }

  void word_or_number(Json& value) {
    if (take_word("null")) return;
    const bool truth = take_word("true");
    if (truth || take_word("false")) {
      value.kind_ = Json::Kind::kFlag;
      value.number_ = truth;
      return;
    }
    const size_t end = std::min(text_.find_first_not_of("+-.0123456789eE", at_), text_.size());
    std::istringstream digits(text_.substr(at_, end - at_));
    digits.imbue(std::locale::classic());  // not the host's, whose numbers may have commas
    if (!(digits >> value.number_) || digits.peek() != EOF || !std::isfinite(value.number_)) fail("no value");
    value.kind_ = Json::Kind::kNumber;
    at_ = end;
  }

  const std::string text_;
  size_t at_ = 0;
};

Json Json::parse(const char* text, size_t size) { return JsonReader(text, size).document(); }

const Json* Json::find(const std::string& name) const {
  for (const auto& [key, value] : members_)
    if (key == name) return &value;
  return nullptr;
}

const Json& Json::member(const std::string& name) const {
  const Json* found = find(name);
  if (!found) refuse("the header lacks '" + name + "'");
  return *found;
}

const Json& Json::of_kind(const std::string& name, Kind kind, const char* called) const {
  const Json& found = member(name);
  if (found.kind_ != kind) refuse("'" + name + "' of the header is not " + called);
  return found;
}

int64_t Json::as_integer(const std::string& name, int64_t low, int64_t high) const {
  if (kind_ != Kind::kNumber || number_ != std::floor(number_) || std::fabs(number_) > 9e15)
    refuse("'" + name + "' of the header is not a whole number");
  need_in(name.c_str(), static_cast<int64_t>(number_), low, high);
  return static_cast<int64_t>(number_);
}

int64_t Json::integer(const std::string& name, int64_t low, int64_t high) const {
  return member(name).as_integer(name, low, high);
}
double Json::number(const std::string& name) const { return of_kind(name, Kind::kNumber, "a number").number_; }
std::string Json::text(const std::string& name) const { return of_kind(name, Kind::kText, "text").text_; }
bool Json::flag(const std::string& name) const { return of_kind(name, Kind::kFlag, "true or false").number_ != 0; }

}  // namespace fastff
