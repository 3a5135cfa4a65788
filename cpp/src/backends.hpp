/// The libraries that this one can be built with; each is one source file.
#pragma once

#include <memory>

#include "variator/engine.hpp"

namespace variator {

std::unique_ptr<Backend> onnxruntime_backend();

#ifdef VARIATOR_WITH_TENSORRT
std::unique_ptr<Backend> tensorrt_backend();
#endif

}  // namespace variator
