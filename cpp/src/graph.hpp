/// What has to be known of an ONNX file before it is loaded: where its weights lie, and in which precision it computes.
///
/// Reads the few fields that are needed from protobuf's wire format, and every length with suspicion.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace variator {

/// Refuse a graph whose weights lie outside its directory or beyond the end of a file; tell the precision of most
/// weights that it multiplies with: `int8` or `fp32`.
///
/// @throws BundleError Naming the tensor.
std::string checked_precision(const std::filesystem::path& graph);

}  // namespace variator
