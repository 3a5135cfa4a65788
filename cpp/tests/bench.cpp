/// What `Runtime::infer` takes over ONNX Runtime's own call, in turns: bench BUNDLE RATIO ROWSxLENGTH RUNS
///
/// The raw call is a session of its own over the same artefact with the same options, its inputs ready in memory and its
/// outputs left where the library put them. Prints the times of every turn as JSON, in µs.

#include <onnxruntime_cxx_api.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "built.hpp"
#include "json.hpp"
#include "machine.hpp"
#include "rows.hpp"
#include "variator/variator.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using variator::Json;

template <typename Work>
double us(const Work& work) {
  const auto start = Clock::now();
  work();
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

std::vector<variator::Row> rows_of(std::size_t count, std::size_t length, std::int64_t vocabulary) {
  std::vector<variator::Row> rows(count);
  for (std::size_t row = 0; row < count; ++row) {
    for (std::size_t i = 0; i < length; ++i) {
      rows[row].ids.push_back(static_cast<std::int64_t>(7 * row + 13 * i + 5) % vocabulary);
    }
  }
  return rows;
}

/// A session as the library makes it, called with nothing around it.
class Raw {
 public:
  explicit Raw(const std::string& graph) : session_(environment_, graph.c_str(), options()) {
    const Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
      inputs_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
    }
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
      outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
    }
    for (const std::string& name : inputs_) {
      taken_.push_back(name.c_str());
    }
    for (const std::string& name : outputs_) {
      given_.push_back(name.c_str());
    }
  }

  void feed(variator::Feed& feed) {
    const std::array<std::int64_t, 2> shape = {feed.rows, feed.length};
    for (const std::string& name : inputs_) {
      std::vector<std::int64_t>& values = feed.inputs.at(name);
      values_.push_back(Ort::Value::CreateTensor(memory_, values.data(), values.size(), shape.data(), shape.size()));
    }
  }

  void run() {
    session_.Run(Ort::RunOptions{nullptr}, taken_.data(), values_.data(), values_.size(), given_.data(), given_.size());
  }

 private:
  static Ort::SessionOptions options() {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(variator::cores() == variator::all_cores() ? 0 : variator::cores());
    options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    options.SetGraphOptimizationLevel(ORT_DISABLE_ALL);
    options.DisableMemPattern();
    options.AddConfigEntry("session.use_env_allocators", "1");
    return options;
  }

  Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "bench"};
  Ort::Session session_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::string> inputs_, outputs_;
  std::vector<const char*> taken_, given_;
  std::vector<Ort::Value> values_;
};

Json bench(const std::string& path, const variator::Key& ratio, const std::string& shape, int runs) {
  variator::OpenOptions options;
  options.engine = "onnxruntime";
  options.verify = false;
  variator::Runtime runtime(path, options);
  const auto cross = shape.find('x');
  const auto rows = rows_of(std::stoul(shape.substr(0, cross)), std::stoul(shape.substr(cross + 1)),
                            runtime.bundle().manifest().vocabulary);
  const auto built = variator::find_built(runtime.bundle(), "onnxruntime", "").first;
  const auto parts = variator::in_buckets(rows, runtime.bundle().manifest().max_length, {});
  if (parts.size() != 1) {
    throw variator::InputError("a shape that runs in " + std::to_string(parts.size()) + " parts", "one that runs at once");
  }
  variator::Feed feed = variator::feed_of(rows, parts[0], runtime.bundle().manifest().inputs);
  runtime.load(ratio);  // first: its arena is the one that both use
  Raw raw((built.directory / runtime.bundle().ratio(ratio).graph).string());
  raw.feed(feed);
  std::vector<double> raw_us;
  std::vector<double> infer_us;
  for (int turn = -3; turn < runs; ++turn) {  // who comes first changes from turn to turn
    const auto own = [&] { return us([&] { raw.run(); }); };
    const auto whole = [&] { return us([&] { runtime.infer(rows, ratio); }); };
    const bool first = turn % 2 == 0;
    const double one = first ? own() : whole();
    const double other = first ? whole() : own();
    if (turn >= 0) {
      raw_us.push_back(first ? one : other);
      infer_us.push_back(first ? other : one);
    }
  }
  return {{"raw_us", raw_us},   {"infer_us", infer_us},      {"padded_to", parts[0].length}, {"precision", runtime.precision()},
          {"engine", runtime.engine()}, {"onnxruntime", OrtGetApiBase()->GetVersionString()}};
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 5) {
      throw variator::InputError("too few arguments", "BUNDLE RATIO ROWSxLENGTH RUNS");
    }
    std::cout << bench(arguments[1], arguments[2], arguments[3], std::stoi(arguments[4])).dump() << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
