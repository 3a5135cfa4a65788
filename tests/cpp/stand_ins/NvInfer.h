// A stand-in for TensorRT: what src/tensorrt.cpp calls of it. Signatures are TensorRT 10's, the rest is ours.
//
// A plan is a text: its name, a factor, and of each of two profiles the fewest and most rows and the shortest and longest.
// A run gives `embedding` [rows, 3] in half precision: factor x sum of a row's ids / 1024, the profile, the length.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <sstream>
#include <string>

#include "cuda_runtime_api.h"

extern "C" std::int32_t getInferLibVersion() noexcept;  // in nvinfer.cpp: who calls it has to link

namespace nvinfer1 {

using AsciiChar = char;

struct Dims64 {
  static constexpr std::int32_t MAX_DIMS{8};
  std::int32_t nbDims;
  std::int64_t d[MAX_DIMS];
};
using Dims = Dims64;

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5, kFP8 = 6, kBF16 = 7, kINT64 = 8 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, AsciiChar const* msg) noexcept = 0;
  virtual ~ILogger() = default;
};

struct Plan {
  std::string name;
  std::int64_t factor = 0, ranges[2][4] = {};
};

class IExecutionContext {
 public:
  explicit IExecutionContext(const Plan& plan) : plan_(plan) {}
  bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t) noexcept {
    profile_ = index;
    return index >= 0 && index < 2;
  }
  bool setInputShape(char const* name, Dims const& dims) noexcept {
    const std::int64_t* range = plan_.ranges[profile_];
    rows_ = dims.d[0];
    length_ = dims.d[1];
    return profile_ >= 0 && std::string(name) != "embedding" && rows_ >= range[0] && rows_ <= range[1] && length_ >= range[2] && length_ <= range[3];
  }
  Dims getTensorShape(char const* name) const noexcept {
    return std::string(name) == "embedding" ? Dims{2, {rows_, 3}} : Dims{2, {rows_, length_}};
  }
  bool setTensorAddress(char const* name, void* data) noexcept {
    addresses_[name] = data;
    return data != nullptr;
  }
  bool enqueueV3(cudaStream_t) noexcept {
    const auto* ids = static_cast<const std::int64_t*>(addresses_["input_ids"]);
    auto* out = static_cast<_Float16*>(addresses_["embedding"]);
    for (std::int64_t row = 0; row < rows_; ++row) {
      std::int64_t sum = 0;
      for (std::int64_t i = 0; i < length_; ++i) {
        sum += ids[row * length_ + i];
      }
      out[3 * row] = static_cast<_Float16>(static_cast<float>(plan_.factor * sum) / 1024.0F);
      out[3 * row + 1] = static_cast<_Float16>(profile_);
      out[3 * row + 2] = static_cast<_Float16>(static_cast<float>(length_));
    }
    return true;
  }

 private:
  const Plan& plan_;
  std::int32_t profile_ = -1;
  std::int64_t rows_ = 0, length_ = 0;
  std::map<std::string, void*> addresses_;
};

class ICudaEngine {
 public:
  explicit ICudaEngine(const std::string& text) {
    std::istringstream words(text);
    words >> plan_.name >> plan_.factor;
    for (auto& range : plan_.ranges) {
      for (std::int64_t& one : range) {
        words >> one;
      }
    }
  }
  IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext(plan_); }
  std::int32_t getNbIOTensors() const noexcept { return 3; }
  char const* getIOTensorName(std::int32_t index) const noexcept {
    const char* const names[] = {"input_ids", "attention_mask", "embedding"};
    return names[index];
  }
  TensorIOMode getTensorIOMode(char const* name) const noexcept {
    return std::string(name) == "embedding" ? TensorIOMode::kOUTPUT : TensorIOMode::kINPUT;
  }
  DataType getTensorDataType(char const* name) const noexcept {
    return std::string(name) == "embedding" ? DataType::kHALF : DataType::kINT64;
  }
  std::int32_t getNbOptimizationProfiles() const noexcept { return 2; }
  Dims getProfileShape(char const*, std::int32_t index, OptProfileSelector select) const noexcept {
    const std::int64_t* range = plan_.ranges[index];
    return select == OptProfileSelector::kMIN ? Dims{2, {range[0], range[2]}} : Dims{2, {range[1], range[3]}};
  }
  char const* getName() const noexcept { return plan_.name.c_str(); }

 private:
  Plan plan_;
};

class IRuntime {
 public:
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
    return new ICudaEngine(std::string(static_cast<const char*>(blob), size));
  }
};

inline IRuntime* createInferRuntime(ILogger&) noexcept { return new IRuntime(); }

}  // namespace nvinfer1
