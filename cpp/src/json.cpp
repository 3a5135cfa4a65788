#include "json.hpp"

#include <cmath>

#include "sha256.hpp"

namespace variator {

namespace {

/// Deeper than anything that we write: what reads it may recurse.
constexpr int kDeepest = 64;

/// A field, refused if it is of another kind.
const Json& checked(const Json& object, const std::string& name, bool (Json::*kind)() const noexcept) {
  const Json& value = field(object, name);
  if (!(value.*kind)()) {
    throw FieldError(name + " is " + value.dump(-1, ' ', true, Json::error_handler_t::replace));
  }
  return value;
}

}  // namespace

Json object_in(const std::string& text) {
  const auto shallow = [](int depth, Json::parse_event_t /*event*/, const Json& /*value*/) {
    if (depth > kDeepest) {
      throw FieldError("not JSON: more than " + std::to_string(kDeepest) + " levels deep");
    }
    return true;
  };
  Json value;
  try {
    value = Json::parse(text, shallow);
  } catch (const Json::exception& error) {
    throw FieldError(std::string("not JSON: ") + error.what());
  }
  if (!value.is_object()) {
    throw FieldError("not a JSON object");
  }
  return value;
}

const Json& field(const Json& object, const std::string& name) {
  if (!object.is_object() || !object.contains(name)) {
    throw FieldError(name + " is missing");
  }
  return object[name];
}

std::string text_of(const Json& object, const std::string& name) {
  return checked(object, name, &Json::is_string).get<std::string>();
}

std::int64_t whole_of(const Json& object, const std::string& name) {
  const Json& value = checked(object, name, &Json::is_number_integer);
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX)) {
    throw FieldError(name + " is " + value.dump());
  }
  return value.get<std::int64_t>();
}

double real_of(const Json& object, const std::string& name) {
  const double value = checked(object, name, &Json::is_number).get<double>();
  if (!std::isfinite(value)) {
    throw FieldError(name + " is not finite");
  }
  return value;
}

bool truth_of(const Json& object, const std::string& name) {
  return checked(object, name, &Json::is_boolean).get<bool>();
}

std::vector<std::string> texts_of(const Json& object, const std::string& name) {
  std::vector<std::string> texts;
  for (const Json& value : checked(object, name, &Json::is_array)) {
    if (!value.is_string()) {
      throw FieldError(name + " holds " + value.dump());
    }
    texts.push_back(value.get<std::string>());
  }
  return texts;
}

std::map<std::string, std::string> words_of(const Json& object, const std::string& name) {
  const Json& inner = checked(object, name, &Json::is_object);
  std::map<std::string, std::string> words;
  for (const auto& item : inner.items()) {
    words[item.key()] = text_of(inner, item.key());
  }
  return words;
}

std::map<std::string, FileEntry> files_of(const Json& object, const std::string& name) {
  std::map<std::string, FileEntry> files;
  for (const auto& item : checked(object, name, &Json::is_object).items()) {
    const std::int64_t bytes = whole_of(item.value(), "bytes");
    if (bytes < 0) {
      throw FieldError("bytes is " + std::to_string(bytes));
    }
    files[item.key()] = {static_cast<std::uintmax_t>(bytes), text_of(item.value(), "sha256")};
  }
  return files;
}

std::string sha256_of_json(const Json& value) { return sha256_of(value.dump(-1, ' ', true)); }

}  // namespace variator
