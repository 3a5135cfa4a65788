/// Files on disk: whole texts, and names that stay inside a directory.
#pragma once

#include <filesystem>
#include <string>

namespace variator {

/// What to do about files that are not what they should be.
inline const char* const kCopyAgain = "copy the bundle again, or export again";

/// `directory / name`, refused if it would lie anywhere else (absolute, `..`, or a link that leads out),
/// or in no directory at all.
///
/// @throws BundleError If it would.
std::filesystem::path inside(const std::filesystem::path& directory, const std::string& name);

/// Size of a file in words: `missing`, or its bytes; empty if it has `bytes`.
std::string wrong_size(const std::filesystem::path& file, std::uintmax_t bytes);

/// A file's bytes; false if it cannot be read.
bool read_whole(const std::filesystem::path& path, std::string& text);

}  // namespace variator
