/// The runtime: token ids in, outputs out, at the ratio asked for or at the one that today's load allows.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "variator/bundle.hpp"
#include "variator/engine.hpp"
#include "variator/errors.hpp"
#include "variator/key.hpp"
#include "variator/policy.hpp"

namespace variator {

/// One tokenised input. Special tokens are part of the ids.
struct Row {
  std::vector<std::int64_t> ids;
  /// Token types, 0 or 1, one per id; empty means all 0.
  std::vector<std::int64_t> types = {};
};

/// Turns texts into rows. The library brings none: give it the one that you use, over the bundle's `tokenizer.json`.
class VARIATOR_EXPORT Tokenizer {
 public:
  Tokenizer() = default;
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;
  virtual ~Tokenizer();

  /// Called by several threads at once.
  virtual Row encode(const std::string& text) const = 0;

  /// The same in no more than `limit` tokens, by the tokenizer's own truncation, which keeps the special tokens. Called
  /// for texts that are longer, with `InferOptions::truncate`.
  ///
  /// @throws InputError Unless it is overridden.
  virtual Row truncated(const std::string& text, std::int64_t limit) const;
};

/// fp32 values, row by row.
struct Tensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;

  /// Values of one row: `values.size() / shape[0]` of them.
  const float* row(std::size_t index) const {
    return values.data() + index * (values.size() / static_cast<std::size_t>(shape[0]));
  }
};

/// A task's outputs by name, one row per input.
using Outputs = std::map<std::string, Tensor>;

/// How a bundle is opened.
struct OpenOptions {
  /// `auto`, or the name of a backend.
  std::string engine = "auto";
  /// Empty takes the fastest without int8's loss.
  std::string precision = {};
  /// 0 means all cores that this process may use.
  int threads = 0;
  /// Whether every file of the bundle is hashed when it is opened; what an engine reads is hashed in any case.
  bool verify = true;
  /// For requests that are texts.
  std::shared_ptr<const Tokenizer> tokenizer = {};
  /// For ratio `auto`: `drain`, `slackfit`, `thresholds` or `fixed(4)`.
  std::string policy = "drain";
  /// For requests with ratio `auto` that bring none of their own, ms from call to answer.
  double slo_ms = 100.0;
  /// Requests with ratio `auto` that may wait; one more is refused.
  int max_queue = 10000;
};

/// What a request may say beside its ratio.
struct InferOptions {
  /// Cut what is longer than the model's limit instead of refusing it: token ids at the end, texts as the tokenizer does.
  bool truncate = false;
  /// With ratio `auto`: ms from call to answer; none takes that of `OpenOptions`.
  std::optional<double> slo_ms = {};
};

/// What one request got.
struct Result {
  /// Token outputs are padded to the longest row: logits with -3e4, others with 0.
  Outputs outputs;
  /// Tokens per row.
  std::vector<std::int64_t> lengths;
  Key ratio = 1;
  std::string engine;
  /// As read back from the engine.
  std::string precision;
  /// ms to load the ratio, for the first request that asks for it.
  double load_ms = 0.0;
  /// ms that the request waited for others.
  double queue_ms = 0.0;
  /// ms in the engine; of the whole batch if it was served in one.
  double compute_ms = 0.0;
  /// Of this ratio, relative to ratio 1; 0 where no score was recorded with its plugin.
  double expected_quality = 0.0;
};

/// An opened bundle. Threads may share it: requests compute one after another, each with all of the runtime's threads.
/// It must outlive the calls that use it; its end gives all memory back.
class VARIATOR_EXPORT Runtime {
 public:
  /// Open a bundle with an engine that `variator build` has built for it on this machine.
  ///
  /// @throws BundleError If the bundle is damaged.
  /// @throws EngineError If no fitting engine is built, or it is stale or damaged.
  explicit Runtime(const std::filesystem::path& bundle, OpenOptions options = {});
  Runtime(Runtime&&) noexcept;
  Runtime& operator=(Runtime&&) noexcept;
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;
  ~Runtime();

  /// Run a request.
  ///
  /// @param rows At least one.
  /// @param ratio One that the bundle has, or the name of a setting; 1 is the uncompressed backbone. `auto` takes the
  ///   lowest that today's load allows; calls that wait at the same time share batches.
  /// @throws InputError For an empty request or row, a row that is too long, ids outside the vocabulary, or a ratio that
  ///   the bundle does not have.
  /// @throws EngineError If the engine refuses, or for `auto` if no latency was measured here.
  /// @throws DeadlineExceeded, Overloaded With `auto`, if the request cannot be answered in time.
  Result infer(const std::vector<Row>& rows, const Key& ratio, const InferOptions& options = {});

  /// The same for texts, by the tokenizer that the runtime was opened with.
  ///
  /// @throws InputError As above, and if there is no tokenizer.
  Result infer_texts(const std::vector<std::string>& texts, const Key& ratio, const InferOptions& options = {});

  /// Load a ratio now, instead of with its first request. Errors as `infer`.
  void load(const Key& ratio);

  const Bundle& bundle() const noexcept;
  const std::string& engine() const noexcept;
  const std::string& precision() const noexcept;

  /// Which engine was picked, and why.
  const std::string& picked() const noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace variator
