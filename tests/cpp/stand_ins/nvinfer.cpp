// The library of the stand-in for TensorRT.
#include "NvInfer.h"

std::int32_t getInferLibVersion() noexcept { return 101601; }
