/// What an engine is: the contract between the runtime and the libraries that compute.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "variator/bundle.hpp"

namespace variator {

/// The inputs of one run: every one int64 [rows, length], padded on the right with 0.
struct Feed {
  std::int64_t rows = 0;
  std::int64_t length = 0;
  std::map<std::string, std::vector<std::int64_t>> inputs;
};

/// Takes an output while its run's memory lasts: name, shape, values.
using Sink = std::function<void(const std::string&, const std::vector<std::int64_t>&, const float*)>;

/// Shapes that an engine takes, rows x tokens.
struct ShapeRange {
  std::int64_t least_rows = 1, most_rows = 1, shortest = 1, longest = 1;

  bool holds(std::int64_t rows, std::int64_t length) const noexcept {
    return rows >= least_rows && rows <= most_rows && length >= shortest && length <= longest;
  }
};

/// One graph, compiled and loaded.
class VARIATOR_EXPORT Engine {
 public:
  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine();

  /// Compute, and give every output to `sink`.
  ///
  /// @throws EngineError If the library refuses.
  virtual void run(const Feed& feed, const Sink& sink) = 0;

  /// As read back from what was loaded.
  virtual std::string precision() const = 0;

  /// Ranges of shapes that it takes; empty if it takes every one.
  virtual std::vector<ShapeRange> profiles() const { return {}; }
};

/// What `engine.json` says of an engine on disk.
struct EngineRecord {
  std::string backend, precision, key;
  bool gated = false;
  /// What it was made from: versions, options, the hash of the bundle's graphs and weights.
  std::map<std::string, std::string> parts;
  /// The machine that it is bound to.
  std::map<std::string, std::string> target;
  std::map<std::string, FileEntry> files;
  /// Mean over the ratios of the latency when it was built; orders engines, is no benchmark.
  double probe_ms = 0.0;
};

/// A library that runs what `variator build` has compiled. Each is one source file.
class VARIATOR_EXPORT Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend();

  /// As engines on disk are named for.
  virtual std::string name() const = 0;

  /// Why an engine cannot be run here: the library's version, the machine, no device; empty if it can.
  virtual std::string misfit(const EngineRecord& record) const = 0;

  /// The processor or GPU that it runs on, in words.
  virtual std::string device() const = 0;

  /// Those of a built engine's files that `load` reads for a graph.
  virtual std::vector<std::string> artefacts(const std::string& graph, const EngineRecord& record) const = 0;

  /// Load the artefact of one of the bundle's graphs.
  ///
  /// @throws EngineError, BundleError If it cannot be.
  virtual std::unique_ptr<Engine> load(const std::filesystem::path& directory, const std::string& graph,
                                       int threads) const = 0;
};

/// Those that this library was built with, best default first.
VARIATOR_EXPORT const std::vector<std::unique_ptr<Backend>>& backends();

}  // namespace variator
