/// ONNX Runtime on CPUs: the optimised graphs that `variator build` wrote, every ratio's weights mapped from one file.
///
/// The options are those of `engines.onnxruntime`, so that results are Python's; see there for what each gains. One of
/// them, `enable_mem_reuse`, has no setter in ONNX Runtime's C API.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <mutex>

#include "backends.hpp"
#include "files.hpp"
#include "graph.hpp"
#include "machine.hpp"

namespace variator {

namespace {

/// The process's environment, and in it the memory arena that all sessions share. It goes with the last engine.
std::shared_ptr<Ort::Env> environment() {
  static std::mutex lock;
  static std::weak_ptr<Ort::Env> known;
  const std::scoped_lock hold(lock);
  std::shared_ptr<Ort::Env> found = known.lock();
  if (!found) {
    found = std::make_shared<Ort::Env>(ORT_LOGGING_LEVEL_ERROR, "variator");
    const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    OrtStatus* refused = Ort::GetApi().CreateAndRegisterAllocator(*found, memory, nullptr);
    // Refused if the program that this library is part of has one already: then sessions share that one.
    Ort::GetApi().ReleaseStatus(refused);
    known = found;
  }
  return found;
}

Ort::SessionOptions session_options(int threads) {
  Ort::SessionOptions options;
  // All cores are asked for as 0: only then does ONNX Runtime pin its threads to them.
  options.SetIntraOpNumThreads(threads == cores() && threads == all_cores() ? 0 : threads);
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
  options.AddConfigEntry("session.intra_op.allow_spinning", "0");
  options.SetGraphOptimizationLevel(ORT_DISABLE_ALL);  // done at build
  options.DisableMemPattern();
  options.AddConfigEntry("session.use_env_allocators", "1");
  return options;
}

class OnnxRuntimeEngine final : public Engine {
 public:
  OnnxRuntimeEngine(const std::filesystem::path& graph, int threads, std::string precision)
      : environment_(environment()),
        session_(*environment_, graph.c_str(), session_options(threads)),
        precision_(std::move(precision)) {
    const Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
      inputs_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
    }
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
      outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
    }
  }

  void run(const Feed& feed, const Sink& sink) override {
    try {
      compute(feed, sink);
    } catch (const Ort::Exception& error) {
      throw EngineError(std::string("ONNX Runtime failed: ") + error.what());
    }
  }

  std::string precision() const override { return precision_; }

 private:
  void compute(const Feed& feed, const Sink& sink) {
    const std::vector<const char*> taken = pointers(inputs_);
    const std::vector<const char*> given = pointers(outputs_);
    const std::vector<Ort::Value> values = values_of(feed);
    const std::vector<Ort::Value> results =
        session_.Run(Ort::RunOptions{nullptr}, taken.data(), values.data(), values.size(), given.data(), given.size());
    for (std::size_t i = 0; i < results.size(); ++i) {
      const auto about = results[i].GetTensorTypeAndShapeInfo();
      if (about.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        throw EngineError("the graph's output " + outputs_[i] + " is not fp32", "", "build again");
      }
      sink(outputs_[i], about.GetShape(), results[i].GetTensorData<float>());
    }
  }

  /// Values over the feed's own memory.
  std::vector<Ort::Value> values_of(const Feed& feed) const {
    const std::array<std::int64_t, 2> shape = {feed.rows, feed.length};
    std::vector<Ort::Value> values;
    for (const std::string& name : inputs_) {
      const auto found = feed.inputs.find(name);
      if (found == feed.inputs.end()) {
        throw EngineError("nothing is given for the input " + name + " of the graph", "", "export again");
      }
      auto* data = const_cast<std::int64_t*>(found->second.data());  // NOLINT(cppcoreguidelines-pro-type-const-cast): the library only reads
      values.push_back(Ort::Value::CreateTensor(memory_, data, found->second.size(), shape.data(), shape.size()));
    }
    return values;
  }

  static std::vector<const char*> pointers(const std::vector<std::string>& names) {
    std::vector<const char*> found(names.size());
    std::transform(names.begin(), names.end(), found.begin(), [](const std::string& name) { return name.c_str(); });
    return found;
  }

  std::shared_ptr<Ort::Env> environment_;
  Ort::Session session_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::string precision_;
  std::vector<std::string> inputs_, outputs_;
};

class OnnxRuntimeBackend final : public Backend {
 public:
  std::string name() const override { return "onnxruntime"; }

  std::string misfit(const EngineRecord& record) const override {
    const std::string here = OrtGetApiBase()->GetVersionString();
    const auto version = record.parts.find("version");
    if (version == record.parts.end() || version->second != here) {
      return "it was built with ONNX Runtime " + (version == record.parts.end() ? "?" : version->second) + ", " + here +
             " is here";
    }
    const auto cpu = record.target.find("cpu");
    return cpu != record.target.end() && cpu->second == cpu_features() ? "" : "it was built on another kind of processor";
  }

  std::string device() const override { return cpu_name(); }

  std::vector<std::string> artefacts(const std::string& graph, const EngineRecord& record) const override {
    std::vector<std::string> names = {graph};
    for (const auto& [name, entry] : record.files) {
      if (std::filesystem::path(name).extension() != ".onnx") {
        names.push_back(name);
      }
    }
    return names;
  }

  std::unique_ptr<Engine> load(const std::filesystem::path& directory, const std::string& graph,
                               int threads) const override {
    if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
      throw EngineError(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                            " is older than the headers that this library was built with",
                        "", "put a newer libonnxruntime first on the library path");
    }
    const std::filesystem::path path = inside(directory, graph);
    std::string precision = checked_precision(path);
    try {
      return std::make_unique<OnnxRuntimeEngine>(path, threads, std::move(precision));
    } catch (const Ort::Exception& error) {
      throw EngineError("ONNX Runtime cannot load " + path.filename().string() + ": " + error.what(), "",
                        "variator build BUNDLE --rebuild");
    }
  }
};

}  // namespace

std::unique_ptr<Backend> onnxruntime_backend() { return std::make_unique<OnnxRuntimeBackend>(); }

}  // namespace variator
