/// SHA-256 (FIPS 180-4), which manifests name files by.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace variator {

/// Hex digest of bytes.
std::string sha256_of(std::string_view bytes);

/// Hex digest of a file.
///
/// @throws BundleError If it cannot be read.
std::string sha256_of_file(const std::filesystem::path& path);

}  // namespace variator
