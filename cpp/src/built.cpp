#include "built.hpp"

#include <algorithm>
#include <limits>

#include "files.hpp"
#include "json.hpp"
#include "machine.hpp"
#include "sha256.hpp"
#include "variator/version.h"

namespace variator {

namespace fs = std::filesystem;

namespace {

constexpr int kEngineFormat = 2;
constexpr std::size_t kKeyDigits = 16;
const char* const kEngineFile = "engine.json";
const char* const kLatencyFile = "latency.json";
const char* const kRebuild = "variator build BUNDLE --rebuild";

/// Precisions that are run only when they are asked for.
bool lossy(const std::string& precision) { return precision == "int8" || precision == "fp8"; }

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// What an engine's directory is named for: backend, precision and key.
struct EngineName {
  fs::path directory;
  std::string backend, precision;
};

std::vector<EngineName> engine_directories(const Bundle& bundle) {
  std::vector<EngineName> found;
  std::error_code trouble;
  for (const fs::directory_entry& entry : fs::directory_iterator(bundle.path() / "engines", trouble)) {
    const std::string name = entry.path().filename().string();
    const auto last = name.rfind('-');
    const auto middle = last == std::string::npos || last == 0 ? std::string::npos : name.rfind('-', last - 1);
    if (middle != std::string::npos && name[0] != '.') {
      found.push_back({entry.path(), name.substr(0, middle), name.substr(middle + 1, last - middle - 1)});
    }
  }
  std::sort(found.begin(), found.end(), [](const auto& one, const auto& other) { return one.directory < other.directory; });
  return found;
}

double mean_of(const Json& times) {
  double sum = 0.0;
  for (const Json& time : times) {
    sum += time.get<double>();
  }
  return times.empty() ? std::numeric_limits<double>::infinity() : sum / static_cast<double>(times.size());
}

EngineRecord record_in(const Json& data) {
  EngineRecord record;
  record.backend = text_of(data, "backend");
  record.precision = text_of(data, "precision");
  record.key = text_of(data, "key");
  record.gated = truth_of(data, "gated");
  record.parts = words_of(data, "parts");
  record.target = words_of(data, "target");
  record.files = files_of(data, "files");
  record.probe_ms = mean_of(field(data, "probe_ms"));
  return record;
}

/// Read `engine.json`, refused unless it is that of the engine its directory is named for.
EngineRecord read_record(const fs::path& directory) {
  const fs::path place = directory / kEngineFile;
  std::string text;
  if (!read_whole(place, text)) {
    throw EngineError(place.string() + " cannot be read", "", kRebuild);
  }
  try {
    const Json data = object_in(text);
    EngineRecord record = record_in(data);
    const Json made = {{"parts", record.parts}, {"target", record.target}, {"choices", words_of(data, "choices")}};
    const std::string key = sha256_of_json(made).substr(0, kKeyDigits);
    const std::string named = record.backend + "-" + record.precision + "-" + key;
    if (whole_of(data, "format") != kEngineFormat || record.key != key || directory.filename() != named) {
      throw EngineError(directory.string() + " does not hold the engine it is named for", "", kRebuild);
    }
    return record;
  } catch (const FieldError& error) {
    throw EngineError(place.string() + " is damaged: " + error.what(), "", kRebuild);
  } catch (const Json::exception& error) {
    throw EngineError(place.string() + " is damaged: " + error.what(), "", kRebuild);
  }
}

/// Hash of the bundle's graphs, weights and gate (whose texts calibrate int8).
std::string hash_of_graphs(const Bundle& bundle) {
  Json hashes = Json::object();
  for (const auto& [name, entry] : bundle.manifest().files) {
    const auto kinds = {".onnx", ".data", "gate.safetensors", "gate-decoder.safetensors"};
    if (std::any_of(kinds.begin(), kinds.end(), [&file = name](const char* kind) { return ends_with(file, kind); })) {
      hashes[name] = entry.sha256;
    }
  }
  return sha256_of_json(hashes);
}

/// Why an engine cannot be run here, now, for this bundle; empty if it can.
std::string why_not(const Bundle& bundle, const Backend& backend, const EngineRecord& record) {
  const auto part = [&record](const std::string& name) {
    const auto found = record.parts.find(name);
    return found == record.parts.end() ? std::string() : found->second;
  };
  if (part("format") != std::to_string(kEngineFormat) || part("backend") != record.backend) {
    return "stale: other format";
  }
  if (part("variator") != VARIATOR_VERSION) {
    return "stale: it was built with variator " + part("variator") + ", " VARIATOR_VERSION " is here";
  }
  if (part("graphs") != hash_of_graphs(bundle)) {
    return "stale: other graphs";
  }
  const std::string misfit = backend.misfit(record);
  if (!misfit.empty()) {
    return "stale: " + misfit;
  }
  return record.gated ? "" : "it was built ahead of time and not yet checked here; `variator build` does that at once";
}

const Backend* backend_named(const std::string& name) {
  for (const auto& backend : backends()) {
    if (backend->name() == name) {
      return backend.get();
    }
  }
  return nullptr;
}

void check_name(const std::string& engine) {
  std::string known = "auto";
  for (const auto& backend : backends()) {
    known += ", " + backend->name();
  }
  if (engine != "auto" && backend_named(engine) == nullptr) {
    throw InputError("unknown engine '" + engine + "'", known, "build this library with that backend");
  }
}

/// Whether an engine is one that was asked for.
bool wanted(const EngineName& name, const std::string& engine, const std::string& precision) {
  const bool backend = engine == "auto" || engine == name.backend;
  const bool unasked = precision.empty() && (!lossy(name.precision) || engine == name.backend);
  return backend && (precision == name.precision || unasked);
}

struct Found {
  std::vector<BuiltEngine> fitting;
  std::string stale;
};

Found look(const Bundle& bundle, const std::string& engine, const std::string& precision) {
  Found found;
  for (const EngineName& name : engine_directories(bundle)) {
    const Backend* backend = backend_named(name.backend);
    if (backend == nullptr || !wanted(name, engine, precision)) {
      continue;
    }
    std::string reason;
    try {
      const EngineRecord record = read_record(name.directory);
      reason = why_not(bundle, *backend, record);
      if (reason.empty()) {
        found.fitting.push_back({name.directory, record, backend});
      }
    } catch (const EngineError& damage) {
      reason = damage.problem();
    }
    if (!reason.empty()) {
      found.stale.append(found.stale.empty() ? "" : "; ").append(name.backend).append(" ").append(name.precision);
      found.stale.append(": ").append(reason);
    }
  }
  return found;
}

std::string described(const BuiltEngine& built) { return built.record.backend + " " + built.record.precision; }

/// Hash the named files of an engine.
void verify(const BuiltEngine& built, const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    const auto recorded = built.record.files.find(name);
    const fs::path file = inside(built.directory, name);
    if (recorded == built.record.files.end() || !wrong_size(file, recorded->second.bytes).empty() ||
        sha256_of_file(file) != recorded->second.sha256) {
      throw EngineError(file.string() + " is missing or has changed since it was built", "",
                        "variator build " + built.directory.parent_path().parent_path().string() + " --engine " +
                            built.record.backend + " --precision " + built.record.precision + " --rebuild");
    }
  }
}

}  // namespace

std::pair<BuiltEngine, std::string> find_built(const Bundle& bundle, const std::string& engine,
                                               const std::string& precision) {
  check_name(engine);
  Found found = look(bundle, engine, precision);
  const std::string asked = "--engine " + engine + (precision.empty() ? "" : " --precision " + precision);
  if (found.fitting.empty()) {
    throw EngineError(found.stale.empty() ? "no engine is built for " + bundle.path().string() + " that fits " + asked
                                          : "the engines built for " + bundle.path().string() + " cannot be used (" +
                                                found.stale + ")",
                      "an engine built on this machine, by this library version, from this export",
                      "variator build " + bundle.path().string() + " " + asked);
  }
  // int8 and fp8 cost quality: last, even where their backend was asked for by name.
  const auto order = [](const BuiltEngine& built) {
    return std::make_pair(lossy(built.record.precision), built.record.probe_ms);
  };
  const auto best = std::min_element(found.fitting.begin(), found.fitting.end(), [&order](const auto& one, const auto& other) {
    return order(one) < order(other);
  });
  std::string why = described(*best) + (found.fitting.size() > 1 ? ": fastest when built" : ": the only one that fits");
  why += found.stale.empty() ? "" : "; not usable: " + found.stale;
  return {*best, why};
}

std::unique_ptr<Engine> load_engine(const Bundle& bundle, const BuiltEngine& built, const std::string& graph,
                                    int threads) {
  verify(built, built.backend->artefacts(graph, built.record));
  std::unique_ptr<Engine> engine = built.backend->load(built.directory, graph, threads);
  if (engine->precision() != built.record.precision) {
    throw EngineError(built.directory.string() + " runs in " + engine->precision() + ", its record says " +
                          built.record.precision,
                      "", "variator build " + bundle.path().string() + " --engine " + built.record.backend + " --rebuild");
  }
  return engine;
}

LatencyTable load_table(const BuiltEngine& built, int threads) {
  const fs::path path = built.directory / kLatencyFile;
  const std::string command = "variator bench " + built.directory.parent_path().parent_path().string() +
                              " --calibrate --engine " + built.record.backend + " --precision " +
                              built.record.precision;
  std::string text;
  if (!read_whole(path, text)) {
    throw EngineError("no latency was measured for " + built.directory.string(), "", command);
  }
  LatencyTable table = [&] {
    try {
      return LatencyTable::from_json(text);
    } catch (const EngineError& error) {
      throw EngineError(path.string() + ": " + error.problem(), "", command);
    }
  }();
  if (table.key() != built.record.key) {
    throw EngineError(path.string() + " was measured with another engine (" + table.key() + ")", "", command);
  }
  const std::map<std::string, std::string> here = {{"device", built.backend->device()},
                                                   {"cpu", cpu_name()},
                                                   {"cores", std::to_string(cores())},
                                                   {"threads", std::to_string(threads)}};
  for (const auto& [name, value] : here) {
    const auto measured = table.machine().find(name);
    if (measured == table.machine().end() || measured->second != value) {
      std::string another = " was measured with another ";
      another.append(name).append(", here it is ").append(value);
      throw EngineError(path.string() + another, "", command);
    }
  }
  return table;
}

}  // namespace variator
