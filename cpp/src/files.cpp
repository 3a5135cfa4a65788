#include "files.hpp"

#include <algorithm>
#include <fstream>
#include <system_error>

#include "variator/errors.hpp"

namespace variator {

namespace fs = std::filesystem;

fs::path inside(const fs::path& directory, const std::string& name) {
  std::error_code trouble;
  const fs::path whole = directory.empty() ? fs::path() : fs::absolute(directory, trouble);
  const fs::path base = trouble ? fs::path() : fs::weakly_canonical(whole, trouble);
  const fs::path path = trouble ? fs::path() : fs::weakly_canonical(whole / name, trouble);
  const bool plain = !name.empty() && name.find('\0') == std::string::npos && !fs::path(name).is_absolute();
  const auto meeting = std::mismatch(base.begin(), base.end(), path.begin(), path.end());
  if (!plain || base.empty() || trouble || meeting.first != base.end()) {
    throw BundleError("'" + name + "' is a path outside " + directory.string(),
                      "plain names of files in the directory", "export again");
  }
  return directory / name;
}

std::string wrong_size(const fs::path& file, std::uintmax_t bytes) {
  std::error_code trouble;
  const bool there = fs::is_regular_file(file, trouble);
  const std::uintmax_t found = there ? fs::file_size(file, trouble) : 0;
  if (!there || trouble) {
    return "missing";
  }
  return found == bytes ? "" : std::to_string(found) + " bytes long";
}

bool read_whole(const fs::path& path, std::string& text) {
  std::error_code trouble;
  if (!fs::is_regular_file(path, trouble)) {
    return false;
  }
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const auto size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
  if (size < 0) {
    return false;
  }
  text.resize(static_cast<std::size_t>(size));
  file.seekg(0).read(text.data(), size);
  return file.gcount() == size;
}

}  // namespace variator
