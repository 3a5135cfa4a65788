#include "variator/errors.hpp"

namespace variator {

namespace {

std::string lines(const std::string& problem, const std::string& valid, const std::string& fix) {
  return problem + (valid.empty() ? "" : "\nvalid: " + valid) + (fix.empty() ? "" : "\nfix: " + fix);
}

}  // namespace

Error::Error(const std::string& problem, const std::string& valid, const std::string& fix)
    : std::runtime_error(lines(problem, valid, fix)), problem_(problem) {}

}  // namespace variator
