/// The bundle on disk: what its manifest says, read with suspicion. Nothing is written here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "variator/errors.hpp"
#include "variator/key.hpp"

namespace variator {

/// Size and hash of one file.
struct FileEntry {
  std::uintmax_t bytes = 0;
  std::string sha256;
};

/// One ratio of a bundle.
struct RatioEntry {
  /// File name of its ONNX graph.
  std::string graph;
  /// Whether its plugin is for speed measurements only.
  bool untrained = false;
  /// Relative to ratio 1, where a score was recorded with the plugin; else 0.
  double expected_quality = 0.0;
};

/// The fields of `manifest.json` that serving needs.
struct Manifest {
  int format_version = 0;
  std::string model;
  std::string task;
  std::int64_t hidden_size = 0;
  std::int64_t vocabulary = 0;
  /// Longest row in tokens.
  std::int64_t max_length = 0;
  std::vector<std::string> inputs;
  std::vector<std::string> outputs;
  /// Of a classifier's classes, in order.
  std::vector<std::string> labels;
  std::map<Key, RatioEntry> ratios;
  std::map<std::string, FileEntry> files;
};

/// An exported model on disk.
class VARIATOR_EXPORT Bundle {
 public:
  /// Open a bundle: read its manifest and compare every listed file's size. Hashes: see `verify`.
  ///
  /// @throws BundleError If it is not a bundle, of an unknown version, or a file is missing, of another size, or outside
  ///   of it; or if it is of a kind that only Python serves so far: pictures, decoders, prompts, the shared layout.
  static Bundle open(const std::filesystem::path& path);

  /// Hash the named files, or all, and compare with the manifest.
  ///
  /// @throws BundleError If one differs, or is not listed there.
  void verify(const std::vector<std::string>& names = {}) const;

  /// The ratios it holds, ascending, then other settings by name.
  std::vector<Key> ratios() const;

  /// The entry of a ratio.
  ///
  /// @throws InputError If the bundle has none; lists those it has.
  const RatioEntry& ratio(const Key& ratio) const;

  const std::filesystem::path& path() const noexcept { return path_; }
  const Manifest& manifest() const noexcept { return manifest_; }

 private:
  Bundle(std::filesystem::path path, Manifest manifest);

  std::filesystem::path path_;
  Manifest manifest_;
};

}  // namespace variator
