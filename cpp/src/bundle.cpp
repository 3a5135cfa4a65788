#include "variator/bundle.hpp"

#include <algorithm>
#include <cmath>

#include "files.hpp"
#include "json.hpp"
#include "sha256.hpp"

namespace variator {

namespace {

constexpr int kFirstFormat = 1;
constexpr int kLastFormat = 4;

/// Far more than any model takes; squares of it still fit.
constexpr std::int64_t kLongest = 1048576;

const char* const kManifest = "manifest.json";
const char* const kExportAgain = "export again with `variator export`";

void check_version(const Json& data, const std::string& place) {
  const Json version = data.value("format_version", Json());
  const bool known = version.is_number_integer() && version >= kFirstFormat && version <= kLastFormat;
  if (!known) {
    throw BundleError(place + " has bundle format version " + version.dump(-1, ' ', true, Json::error_handler_t::replace),
                      "1, 2, 3, 4", "use the version of variator that wrote it, or export again");
  }
}

/// What only Python serves so far.
void check_kind(const Json& data, const std::string& place) {
  if (data.value("layout", "per-ratio") != "per-ratio") {
    throw BundleError(place + " has one graph for all ratios, which C++ does not run", "--layout per-ratio",
                      "export it with --layout per-ratio, or serve it with Python");
  }
  struct Kind {
    const char *field, *words, *fix;
  };
  constexpr Kind kinds[] = {
      {"decoder", " has a decoder", "export the encoder alone with --task hidden, or serve it with Python"},
      {"picture", " reads pictures", "serve it with Python"},
      {"prompt", " asks for a class with a template", "serve it with Python"},
  };
  for (const Kind& kind : kinds) {
    if (data.contains(kind.field) && !data[kind.field].is_null()) {
      throw BundleError(place + kind.words + ", which C++ does not run", "encoders of texts", kind.fix);
    }
  }
}

/// Keeps the order of the file, in which the first metric is the one that counts.
using Ordered = nlohmann::ordered_json;

/// Score over ratio 1's, of the split that a plugin was scored on first; 0 if there is none. Rounded as in Python.
double expected_quality(const Ordered& entry) {
  const Ordered scores = entry.value("training", Ordered::object()).value("scores", Ordered::array());
  if (scores.empty()) {
    return 0.0;
  }
  const Ordered& value = scores.at(0).at("value");
  if (value.empty()) {
    return 0.0;
  }
  const std::string metric = value.items().begin().key();
  const double reference = scores.at(0).value("ratio_1", Ordered::object()).value(metric, 0.0);
  constexpr double digits = 1e4;
  return reference == 0.0 ? 0.0 : std::round(real_of(Json(value), metric) / reference * digits) / digits;
}

std::map<Key, RatioEntry> ratios_of(const Json& data, const std::string& text) {
  const Ordered ordered = Ordered::parse(text);
  std::map<Key, RatioEntry> ratios;
  for (const auto& item : field(data, "ratios").items()) {
    const Json& entry = item.value();
    const double quality = expected_quality(ordered.at("ratios").at(item.key()));
    ratios[Key(item.key())] = {text_of(entry, "graph"), entry.value("untrained", false), quality};
  }
  if (const auto first = ratios.find(1); first != ratios.end()) {
    first->second.expected_quality = 1.0;
  }
  return ratios;
}

Manifest manifest_of(const Json& data, const std::string& text) {
  Manifest manifest;
  manifest.format_version = static_cast<int>(whole_of(data, "format_version"));
  manifest.model = text_of(data, "model");
  manifest.task = text_of(data, "task");
  manifest.hidden_size = whole_of(data, "hidden_size");
  manifest.vocabulary = whole_of(data, "vocabulary");
  manifest.max_length = whole_of(data, "max_length");
  manifest.inputs = texts_of(data, "inputs");
  manifest.outputs = texts_of(data, "outputs");
  manifest.labels = data.contains("labels") ? texts_of(data, "labels") : std::vector<std::string>();
  manifest.ratios = ratios_of(data, text);
  manifest.files = files_of(data, "files");
  return manifest;
}

/// What contradicts itself.
void check_whole(const Manifest& manifest) {
  if (manifest.ratios.count(1) == 0) {
    throw FieldError("ratio 1 is not listed");
  }
  for (const std::int64_t size : {manifest.hidden_size, manifest.vocabulary, manifest.max_length}) {
    if (size < 1) {
      throw FieldError("hidden_size, vocabulary or max_length is " + std::to_string(size));
    }
  }
  if (manifest.max_length > kLongest) {
    throw FieldError("max_length is " + std::to_string(manifest.max_length));
  }
  for (const auto& [ratio, entry] : manifest.ratios) {
    if (manifest.files.count(entry.graph) == 0) {
      throw FieldError("'" + entry.graph + "' is not listed");
    }
  }
  const std::vector<std::string> known = {"input_ids", "attention_mask", "token_type_ids"};
  for (const std::string& name : manifest.inputs) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw FieldError("an input is '" + name + "'");
    }
  }
}

Manifest read_manifest(const std::string& text, const std::string& place) {
  try {
    const Json data = object_in(text);
    check_version(data, place);
    check_kind(data, place);
    Manifest manifest = manifest_of(data, text);
    check_whole(manifest);
    return manifest;
  } catch (const FieldError& error) {
    throw BundleError(place + " is damaged: " + error.what(), "", kExportAgain);
  } catch (const Json::exception& error) {
    throw BundleError(place + " is damaged: " + error.what(), "", kExportAgain);
  }
}

}  // namespace

Bundle::Bundle(std::filesystem::path path, Manifest manifest) : path_(std::move(path)), manifest_(std::move(manifest)) {}

Bundle Bundle::open(const std::filesystem::path& path) {
  const std::filesystem::path place = path / kManifest;
  std::string text;
  if (path.empty() || !read_whole(place, text)) {
    throw BundleError("'" + path.string() + "' is not a bundle: cannot read " + kManifest,
                      "a directory written by `variator export`");
  }
  Bundle bundle(path, read_manifest(text, place.string()));
  for (const auto& [name, entry] : bundle.manifest_.files) {
    const std::filesystem::path file = inside(path, name);
    const std::string found = wrong_size(file, entry.bytes);
    if (!found.empty()) {
      throw BundleError(file.string() + " is " + found, std::to_string(entry.bytes) + " bytes", kCopyAgain);
    }
  }
  return bundle;
}

void Bundle::verify(const std::vector<std::string>& names) const {
  std::vector<std::string> wanted = names;
  for (const auto& [name, entry] : manifest_.files) {
    if (names.empty()) {
      wanted.push_back(name);
    }
  }
  for (const std::string& name : wanted) {
    const auto listed = manifest_.files.find(name);
    if (listed == manifest_.files.end()) {
      throw BundleError("'" + name + "' is not listed in the manifest of " + path_.string(), "", kExportAgain);
    }
    if (sha256_of_file(inside(path_, name)) != listed->second.sha256) {
      throw BundleError((path_ / name).string() + " has changed since it was exported (sha256 differs)", "", kCopyAgain);
    }
  }
}

std::vector<Key> Bundle::ratios() const {
  std::vector<Key> found;
  found.reserve(manifest_.ratios.size());
  for (const auto& [ratio, entry] : manifest_.ratios) {
    found.push_back(ratio);
  }
  return found;
}

const RatioEntry& Bundle::ratio(const Key& ratio) const {
  const auto found = manifest_.ratios.find(ratio);
  if (found == manifest_.ratios.end()) {
    throw InputError("ratio '" + ratio.text() + "' is not in " + path_.string(), in_words(ratios()),
                     "export the model again with all the ratios you need, into a new bundle");
  }
  return found->second;
}

}  // namespace variator
