#include "variator/runtime.hpp"

#include <chrono>
#include <mutex>
#include <utility>

#include "auto_queue.hpp"
#include "built.hpp"
#include "loaded.hpp"
#include "machine.hpp"
#include "rows.hpp"
#include "scheduler.hpp"

namespace variator {

namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// A request's inputs to one engine, and its outputs from it. The feed's memory is used again from call to call.
Outputs computed(Engine& engine, const std::vector<Row>& rows, const std::vector<Part>& parts,
                 const std::vector<std::string>& inputs, Feed& feed) {
  const std::vector<std::int64_t> lengths = lengths_of(rows);
  Outputs outputs;
  for (const Part& part : parts) {
    fill(feed, rows, part, inputs);
    engine.run(feed,
               [&](const std::string& name, const std::vector<std::int64_t>& shape, const float* values) {
                 place(outputs, name, shape, values, part.places, lengths);
               });
  }
  return outputs;
}

std::vector<std::string> graphs_of(const Bundle& bundle) {
  std::vector<std::string> graphs;
  for (const auto& [ratio, entry] : bundle.manifest().ratios) {
    graphs.push_back(entry.graph);
  }
  return graphs;
}

}  // namespace

Tokenizer::~Tokenizer() = default;

Row Tokenizer::truncated(const std::string& /*text*/, std::int64_t limit) const {
  throw InputError("a text is longer than " + std::to_string(limit) + " tokens, and the tokenizer given cannot truncate",
                   "texts of up to " + std::to_string(limit) + " tokens", "shorten it, or override Tokenizer::truncated");
}

class Runtime::Impl {
 public:
  Impl(Bundle bundle, OpenOptions options)
      : bundle_(std::move(bundle)),
        options_(std::move(options)),
        threads_(options_.threads > 0 ? options_.threads : cores()),
        engines_(graphs_of(bundle_),
                 [this](const std::string& graph) { return load_engine(bundle_, built_, graph, threads_); }) {
    if (options_.threads < 0 || options_.max_queue < 1) {
      throw InputError("threads is " + std::to_string(options_.threads) + ", max_queue " +
                           std::to_string(options_.max_queue),
                       "0 or more, and 1 or more");
    }
    check_slo(options_.slo_ms);
    static_cast<void>(policy_named(options_.policy, bundle_.ratios()));  // says what there is
    if (options_.verify) {
      bundle_.verify();
    }
    std::tie(built_, picked_) = find_built(bundle_, options_.engine, options_.precision);
  }

  Result infer(const std::vector<Row>& rows, const Key& ratio, const InferOptions& options) {
    const bool by_load = ratio == Key(kAuto) && bundle_.manifest().ratios.count(ratio) == 0;
    if (!by_load && options.slo_ms) {
      throw InputError("slo_ms with ratio '" + ratio.text() + "'", "slo_ms with ratio 'auto'");
    }
    if (!by_load) {
      static_cast<void>(bundle_.ratio(ratio));  // says what the bundle holds
    }
    const bool too_long = check_rows(rows, bundle_.manifest(), options.truncate);
    const std::vector<Row> cut = too_long ? cut_at(bundle_.manifest().max_length, rows) : std::vector<Row>();
    const std::vector<Row>& taken = too_long ? cut : rows;
    Result result = by_load ? queue().infer(taken, options.slo_ms.value_or(options_.slo_ms)) : infer_at(taken, ratio);
    result.engine = built_.record.backend;
    result.precision = built_.record.precision;
    result.expected_quality = bundle_.ratio(result.ratio).expected_quality;
    return result;
  }

  Result infer_texts(const std::vector<std::string>& texts, const Key& ratio, const InferOptions& options) {
    if (!options_.tokenizer) {
      throw InputError("texts, and the runtime was opened without a tokenizer", "lists of token ids",
                       "open it with OpenOptions::tokenizer");
    }
    std::vector<Row> rows;
    rows.reserve(texts.size());
    const std::int64_t limit = bundle_.manifest().max_length;
    for (const std::string& text : texts) {
      rows.push_back(options_.tokenizer->encode(text));
      if (options.truncate && static_cast<std::int64_t>(rows.back().ids.size()) > limit) {
        rows.back() = options_.tokenizer->truncated(text, limit);
      }
    }
    return infer(rows, ratio, {/*truncate=*/false, options.slo_ms});
  }

  /// The engine of a ratio, loaded if it is not yet.
  Engine& engine(const Key& ratio) { return engines_.at(bundle_.ratio(ratio).graph); }

  const Bundle& bundle() const noexcept { return bundle_; }
  const EngineRecord& record() const noexcept { return built_.record; }
  const std::string& picked() const noexcept { return picked_; }

 private:
  Result infer_at(const std::vector<Row>& rows, const Key& ratio) {
    Result result;
    result.ratio = ratio;
    result.lengths = lengths_of(rows);
    const auto asked = Clock::now();
    Engine& used = engine(ratio);
    result.load_ms = ms_since(asked);
    const std::vector<Part> parts = in_buckets(rows, bundle_.manifest().max_length, used.profiles());
    const auto waiting = Clock::now();
    const std::scoped_lock turn(compute_lock_);
    result.queue_ms = ms_since(waiting);
    const auto computing = Clock::now();
    result.outputs = computed(used, rows, parts, bundle_.manifest().inputs, feed_);
    result.compute_ms = ms_since(computing);
    return result;
  }

  Computed compute(const Key& ratio, const std::vector<Row>& rows) {
    Engine& used = engine(ratio);
    const std::vector<Part> parts = together(rows, used.profiles());
    const std::scoped_lock turn(compute_lock_);
    const auto computing = Clock::now();
    Outputs outputs = computed(used, rows, parts, bundle_.manifest().inputs, feed_);
    return {std::move(outputs), ms_since(computing)};
  }

  /// The queue for ratio `auto`, made when it is first needed, with every ratio loaded.
  AutoQueue& queue() {
    const std::scoped_lock hold(queue_lock_);
    if (!queue_) {
      const LatencyTable table = load_table(built_, threads_);
      std::vector<Key> ratios;
      for (const Key& ratio : table.ratios()) {
        if (bundle_.manifest().ratios.count(ratio) != 0) {
          ratios.push_back(ratio);
          engine(ratio);
        }
      }
      Costs costs(table, ratios, buckets_up_to(static_cast<int>(bundle_.manifest().max_length)));
      Policy policy = policy_named(options_.policy, costs.ratios());
      Scheduler scheduler(std::move(costs), std::move(policy), options_.slo_ms, options_.max_queue);
      queue_ = std::make_unique<AutoQueue>(
          std::move(scheduler), [this](const Key& ratio, const std::vector<Row>& rows) { return compute(ratio, rows); });
    }
    return *queue_;
  }

  Bundle bundle_;
  OpenOptions options_;
  int threads_;
  BuiltEngine built_;
  std::string picked_;
  std::mutex compute_lock_, queue_lock_;
  Feed feed_;  // of the run that holds compute_lock_
  Loaded engines_;
  std::unique_ptr<AutoQueue> queue_;
};

Runtime::Runtime(const std::filesystem::path& bundle, OpenOptions options)
    : impl_(std::make_unique<Impl>(Bundle::open(bundle), std::move(options))) {}
Runtime::Runtime(Runtime&&) noexcept = default;
Runtime& Runtime::operator=(Runtime&&) noexcept = default;
Runtime::~Runtime() = default;

Result Runtime::infer(const std::vector<Row>& rows, const Key& ratio, const InferOptions& options) {
  return impl_->infer(rows, ratio, options);
}

Result Runtime::infer_texts(const std::vector<std::string>& texts, const Key& ratio, const InferOptions& options) {
  return impl_->infer_texts(texts, ratio, options);
}

void Runtime::load(const Key& ratio) { impl_->engine(ratio); }

const Bundle& Runtime::bundle() const noexcept { return impl_->bundle(); }
const std::string& Runtime::engine() const noexcept { return impl_->record().backend; }
const std::string& Runtime::precision() const noexcept { return impl_->record().precision; }
const std::string& Runtime::picked() const noexcept { return impl_->picked(); }

}  // namespace variator
