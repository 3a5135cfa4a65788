#include "variator/engine.hpp"

#include "backends.hpp"

namespace variator {

Engine::~Engine() = default;
Backend::~Backend() = default;

const std::vector<std::unique_ptr<Backend>>& backends() {
  static const std::vector<std::unique_ptr<Backend>> all = [] {
    std::vector<std::unique_ptr<Backend>> found;
#ifdef VARIATOR_WITH_TENSORRT
    found.push_back(tensorrt_backend());
#endif
    found.push_back(onnxruntime_backend());
    return found;
  }();
  return all;
}

}  // namespace variator
