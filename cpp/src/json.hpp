/// Fields of JSON objects, of the type that they should have; the parser is nlohmann's.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "variator/bundle.hpp"

namespace variator {

using Json = nlohmann::json;

/// A field that is not what it should be; whoever reads a file says which file.
class FieldError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Parse a text to an object, no more than 64 levels deep.
Json object_in(const std::string& text);

/// A field of an object.
const Json& field(const Json& object, const std::string& name);

/// Fields by type: a whole number is no truth value, a time is a finite number.
std::string text_of(const Json& object, const std::string& name);
std::int64_t whole_of(const Json& object, const std::string& name);
double real_of(const Json& object, const std::string& name);
bool truth_of(const Json& object, const std::string& name);
std::vector<std::string> texts_of(const Json& object, const std::string& name);
std::map<std::string, std::string> words_of(const Json& object, const std::string& name);
std::map<std::string, FileEntry> files_of(const Json& object, const std::string& name);

/// Hex sha256 of a JSON value as Python writes it: sorted keys, no blanks, ASCII.
std::string sha256_of_json(const Json& value);

}  // namespace variator
