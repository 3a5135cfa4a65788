/// TensorRT on NVIDIA GPUs: the plans that `variator build --engine tensorrt` compiled, one execution context each.
///
/// Built with -DVARIATOR_TENSORRT=ON against the user's own TensorRT. No session of ours has run it on a GPU yet.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <sstream>
#include <utility>

#include "backends.hpp"
#include "files.hpp"

namespace variator {

namespace {

namespace trt = nvinfer1;

/// What the library complained about last, for our errors.
class Listening final : public trt::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) {
      const std::scoped_lock hold(lock_);
      said_ = message;
    }
  }

  std::string words() {
    const std::scoped_lock hold(lock_);
    return said_.empty() ? "" : ": " + std::exchange(said_, "");
  }

 private:
  std::mutex lock_;
  std::string said_;
};

Listening& logger() {
  static auto* one = new Listening;  // the library takes one per process, and may speak until the process has ended
  return *one;
}

void check(bool fine, const std::string& what) {
  if (!fine) {
    throw EngineError("the plan refuses " + what + logger().words(), "", "build it again with --rebuild");
  }
}

void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) {
    throw EngineError("CUDA failed at " + what + ": " + cudaGetErrorString(status));
  }
}

/// Makes the first GPU that of this thread, and gives back what the caller had. Engines live on it alone.
class FirstGpu {
 public:
  FirstGpu() noexcept : status_(cudaGetDevice(&before_)) {
    status_ = status_ == cudaSuccess ? cudaSetDevice(0) : status_;
  }
  FirstGpu(const FirstGpu&) = delete;
  FirstGpu& operator=(const FirstGpu&) = delete;
  ~FirstGpu() { cudaSetDevice(before_); }
  cudaError_t status() const noexcept { return status_; }

 private:
  int before_ = 0;
  cudaError_t status_;
};

/// GPUs that can be used; 0 without a driver. Asked first of all: without one the library may return a pointer to nothing.
int gpus() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

/// Memory on the GPU that grows and stays.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(address_); }

  void* room(std::size_t bytes) {
    if (bytes > bytes_) {
      cudaFree(address_);
      address_ = nullptr;
      bytes_ = 0;
      check(cudaMalloc(&address_, bytes), std::to_string(bytes) + " bytes of the GPU's memory");
      bytes_ = bytes;
    }
    return address_;
  }

 private:
  void* address_ = nullptr;
  std::size_t bytes_ = 0;
};

std::size_t bytes_of(trt::DataType type) {
  switch (type) {
    case trt::DataType::kINT64:
      return 8;
    case trt::DataType::kFLOAT:
    case trt::DataType::kINT32:
      return 4;
    case trt::DataType::kHALF:
    case trt::DataType::kBF16:
      return 2;
    default:
      throw EngineError("the plan has an input or output of a type that is not known here", "", "build it again");
  }
}

/// IEEE half precision, bit by bit.
float from_half(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16U;
  const std::uint32_t exponent = (half >> 10U) & 31U;
  const std::uint32_t fraction = half & 1023U;
  std::uint32_t bits = 0;
  if (exponent == 31U) {
    bits = sign | 0x7f800000U | fraction << 13U;
  } else if (exponent != 0U) {
    bits = sign | (exponent + 112U) << 23U | fraction << 13U;
  } else {
    const float tiny = static_cast<float>(fraction) * 0x1p-24F;
    return sign != 0U ? -tiny : tiny;
  }
  float value = 0.0F;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float from_bfloat(std::uint16_t brain) {
  const std::uint32_t bits = static_cast<std::uint32_t>(brain) << 16U;
  float value = 0.0F;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// What came from the GPU, as fp32.
std::vector<float> as_floats(const std::vector<char>& bytes, trt::DataType type, const std::string& name) {
  std::vector<float> values(bytes.size() / bytes_of(type));
  if (type == trt::DataType::kFLOAT) {
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  if (type != trt::DataType::kHALF && type != trt::DataType::kBF16) {
    throw EngineError("the plan's output " + name + " holds no real numbers", "", "build it again");
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::uint16_t narrow = 0;
    std::memcpy(&narrow, bytes.data() + 2 * i, 2);
    values[i] = type == trt::DataType::kHALF ? from_half(narrow) : from_bfloat(narrow);
  }
  return values;
}

class Stream {
 public:
  Stream() { check(cudaStreamCreate(&handle_), "a stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(handle_); }
  cudaStream_t handle() const noexcept { return handle_; }

 private:
  cudaStream_t handle_ = nullptr;
};

/// One plan. The runtime lets one run at a time.
class TensorRtEngine final : public Engine {
 public:
  explicit TensorRtEngine(const std::filesystem::path& plan) : runtime_(trt::createInferRuntime(logger())) {
    std::string bytes;
    if (!runtime_ || !read_whole(plan, bytes)) {
      throw EngineError(plan.string() + " cannot be read, or TensorRT not started" + logger().words());
    }
    engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    check(engine_ != nullptr, "to be loaded from " + plan.string());
    context_.reset(engine_->createExecutionContext());
    check(context_ != nullptr, "an execution context");
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char* name = engine_->getIOTensorName(i);
      const bool taken = engine_->getTensorIOMode(name) == trt::TensorIOMode::kINPUT;
      (taken ? inputs_ : outputs_).emplace_back(name);
    }
    read_profiles();
  }

  void run(const Feed& feed, const Sink& sink) override {
    choose(feed);
    for (const std::string& name : inputs_) {
      copy_in(feed, name);
    }
    std::map<std::string, std::vector<char>> results;
    for (const std::string& name : outputs_) {
      results[name].resize(size_of(name));
      check(context_->setTensorAddress(name.c_str(), buffers_[name].room(results[name].size())), "an address");
    }
    check(context_->enqueueV3(stream_.handle()), "to run");
    for (auto& [name, bytes] : results) {
      check(cudaMemcpyAsync(bytes.data(), buffers_[name].room(0), bytes.size(), cudaMemcpyDeviceToHost, stream_.handle()),
            "the copy of " + name);
    }
    check(cudaStreamSynchronize(stream_.handle()), "the run");
    for (const auto& [name, bytes] : results) {
      const std::vector<float> values = as_floats(bytes, engine_->getTensorDataType(name.c_str()), name);
      sink(name, shape_of(name), values.data());
    }
  }

  /// That of most of its weights, as the builder read it from the library's network; it travels in the plan's name.
  std::string precision() const override {
    const std::string name = engine_->getName();
    return name.substr(name.rfind(':') + 1);
  }

  std::vector<ShapeRange> profiles() const override { return profiles_; }

 private:
  void read_profiles() {
    for (int index = 0; index < engine_->getNbOptimizationProfiles(); ++index) {
      const trt::Dims least = engine_->getProfileShape("input_ids", index, trt::OptProfileSelector::kMIN);
      const trt::Dims most = engine_->getProfileShape("input_ids", index, trt::OptProfileSelector::kMAX);
      check(least.nbDims == 2 && most.nbDims == 2, "profile " + std::to_string(index));
      profiles_.push_back({least.d[0], most.d[0], least.d[1], most.d[1]});
    }
  }

  /// Set the smallest profile that holds a feed, and its shape.
  void choose(const Feed& feed) {
    int best = -1;
    for (int index = 0; index < static_cast<int>(profiles_.size()); ++index) {
      const ShapeRange& one = profiles_[static_cast<std::size_t>(index)];
      const auto smaller = [&one](const ShapeRange& other) {
        return std::make_pair(one.longest, one.most_rows) < std::make_pair(other.longest, other.most_rows);
      };
      if (one.holds(feed.rows, feed.length) && (best < 0 || smaller(profiles_[static_cast<std::size_t>(best)]))) {
        best = index;
      }
    }
    if (best < 0) {
      throw EngineError("no profile of the engine holds " + std::to_string(feed.rows) + "x" +
                            std::to_string(feed.length) + " (rows x tokens)",
                        "", "send fewer or shorter rows, or build with --profile MIN:OPT:MAX that holds it");
    }
    if (best != chosen_) {
      check(context_->setOptimizationProfileAsync(best, stream_.handle()), "profile " + std::to_string(best));
      chosen_ = best;
    }
    trt::Dims shape{};
    shape.nbDims = 2;
    shape.d[0] = feed.rows;
    shape.d[1] = feed.length;
    for (const std::string& name : inputs_) {
      check(context_->setInputShape(name.c_str(), shape), "the shape of " + name);
    }
  }

  void copy_in(const Feed& feed, const std::string& name) {
    const auto found = feed.inputs.find(name);
    if (found == feed.inputs.end() || engine_->getTensorDataType(name.c_str()) != trt::DataType::kINT64) {
      throw EngineError("nothing fits the input " + name + " of the plan", "", "export and build again");
    }
    const std::size_t bytes = found->second.size() * sizeof(std::int64_t);
    void* address = buffers_[name].room(bytes);
    check(cudaMemcpyAsync(address, found->second.data(), bytes, cudaMemcpyHostToDevice, stream_.handle()),
          "the copy of " + name);
    check(context_->setTensorAddress(name.c_str(), address), "an address");
  }

  std::vector<std::int64_t> shape_of(const std::string& name) const {
    const trt::Dims shape = context_->getTensorShape(name.c_str());
    check(shape.nbDims >= 0 && std::all_of(shape.d, shape.d + shape.nbDims, [](std::int64_t one) { return one >= 0; }),
          "the shape of " + name);
    return {shape.d, shape.d + shape.nbDims};
  }

  std::size_t size_of(const std::string& name) const {
    std::size_t bytes = bytes_of(engine_->getTensorDataType(name.c_str()));
    for (const std::int64_t one : shape_of(name)) {
      bytes *= static_cast<std::size_t>(one);
    }
    return bytes;
  }

  // In the order that they need each other.
  std::unique_ptr<trt::IRuntime> runtime_;
  std::unique_ptr<trt::ICudaEngine> engine_;
  Stream stream_;
  std::unique_ptr<trt::IExecutionContext> context_;
  std::map<std::string, Buffer> buffers_;
  std::vector<std::string> inputs_, outputs_;
  std::vector<ShapeRange> profiles_;
  int chosen_ = -1;
};

/// A plan that is loaded, run and given up on the first GPU, whichever the calling thread uses.
class PinnedEngine final : public Engine {
 public:
  explicit PinnedEngine(const std::filesystem::path& plan) {
    const FirstGpu pinned;
    check(pinned.status(), "the choice of the GPU");
    engine_ = std::make_unique<TensorRtEngine>(plan);
  }
  PinnedEngine(const PinnedEngine&) = delete;
  PinnedEngine& operator=(const PinnedEngine&) = delete;
  ~PinnedEngine() override {
    const FirstGpu pinned;
    engine_.reset();
  }

  void run(const Feed& feed, const Sink& sink) override {
    const FirstGpu pinned;
    check(pinned.status(), "the choice of the GPU");
    engine_->run(feed, sink);
  }

  std::string precision() const override { return engine_->precision(); }
  std::vector<ShapeRange> profiles() const override { return engine_->profiles(); }

 private:
  std::unique_ptr<TensorRtEngine> engine_;
};

/// The first three numbers of a version: 10.16.1.11 -> 10.16.1.
std::string short_version(const std::string& version) {
  std::istringstream parts(version);
  std::string found;
  int count = 0;
  for (std::string part; count < 3 && std::getline(parts, part, '.'); ++count) {
    found += (found.empty() ? "" : ".") + part;
  }
  return found;
}

/// The version of the library that was loaded.
std::string version_here() {
  constexpr int kMajor = 10000;
  constexpr int kMinor = 100;
  const int version = getInferLibVersion();
  return std::to_string(version / kMajor) + "." + std::to_string(version % kMajor / kMinor) + "." +
         std::to_string(version % kMinor);
}

const char* const kCapabilities = "compute_capabilities";

cudaDeviceProp properties() {
  cudaDeviceProp found{};
  check(cudaGetDeviceProperties(&found, 0), "the properties of the GPU");
  return found;
}

/// What a plan may be bound to, as Python's `engines.tensorrt` names it.
std::map<std::string, std::string> machine_here() {
  const cudaDeviceProp gpu = properties();
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "the driver's version");
  return {{"gpu", gpu.name},
          {kCapabilities, std::to_string(gpu.major) + "." + std::to_string(gpu.minor)},
          {"cuda", std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10)}};
}

class TensorRtBackend final : public Backend {
 public:
  std::string name() const override { return "tensorrt"; }

  std::string misfit(const EngineRecord& record) const override {
    if (gpus() == 0) {
      return "there is no NVIDIA GPU that can be used";
    }
    const auto version = record.parts.find("version");
    if (version == record.parts.end() || short_version(version->second) != version_here()) {
      return "it was built with TensorRT " + (version == record.parts.end() ? "?" : version->second) + ", " +
             version_here() + " is here";
    }
    const auto here = machine_here();
    if (record.target.count(kCapabilities) == 0) {
      return std::string("it does not say which ") + kCapabilities + " it was built for";
    }
    for (const auto& [part, value] : record.target) {
      const auto found = here.find(part);
      if (found == here.end() || found->second != value) {
        return "it was built for " + part + " " + value;
      }
    }
    return "";
  }

  std::string device() const override { return properties().name; }

  std::vector<std::string> artefacts(const std::string& graph, const EngineRecord& /*record*/) const override {
    return {plan_of(graph)};
  }

  std::unique_ptr<Engine> load(const std::filesystem::path& directory, const std::string& graph,
                               int /*threads*/) const override {
    if (gpus() == 0) {
      throw EngineError("there is no NVIDIA GPU that can be used");
    }
    return std::make_unique<PinnedEngine>(inside(directory, plan_of(graph)));
  }

 private:
  static std::string plan_of(const std::string& graph) {
    return std::filesystem::path(graph).stem().string() + ".plan";
  }
};

}  // namespace

std::unique_ptr<Backend> tensorrt_backend() { return std::make_unique<TensorRtBackend>(); }

}  // namespace variator
