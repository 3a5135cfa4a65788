#include "machine.hpp"

#include <sched.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <set>
#include <sstream>

namespace variator {

namespace {

constexpr const char* kKernelFeatures[] = {"avx2",     "fma",     "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni",
                                           "amx_bf16", "amx_int8", "asimd",  "asimddp",     "i8mm",        "bf16"};

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t");
  const auto last = text.find_last_not_of(" \t");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

const std::map<std::string, std::string>& cpuinfo() {
  static const std::map<std::string, std::string> found = [] {
    std::map<std::string, std::string> entries;
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
      const auto colon = line.find(':');
      if (colon != std::string::npos) {
        entries[trimmed(line.substr(0, colon))] = trimmed(line.substr(colon + 1));
      }
    }
    return entries;
  }();
  return found;
}

std::string entry(const std::string& name) {
  const auto found = cpuinfo().find(name);
  return found == cpuinfo().end() ? "" : found->second;
}

}  // namespace

std::string cpu_name() { return entry("model name"); }

std::string cpu_features() {
  const std::string flags = entry("flags");
  std::istringstream words(flags.empty() ? entry("Features") : flags);
  std::set<std::string> known;
  for (std::string word; words >> word;) {
    known.insert(word);
  }
  std::string found;
  for (const char* feature : kKernelFeatures) {
    if (known.count(feature) != 0) {
      found += (found.empty() ? "" : " ") + std::string(feature);
    }
  }
  return found;
}

int cores() {
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : all_cores();
}

int all_cores() { return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)); }

}  // namespace variator
