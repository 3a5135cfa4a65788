/// Errors: every one says what is wrong, what would be valid, and the fix; catch `variator::Error` for all of them.
#pragma once

#include <stdexcept>
#include <string>

#include "variator/export.h"

namespace variator {

/// A failure that the user can act on.
class VARIATOR_EXPORT Error : public std::runtime_error {
 public:
  /// @param problem What is wrong, with the offending value.
  /// @param valid What would have been accepted.
  /// @param fix What to do about it, a command where there is one.
  explicit Error(const std::string& problem, const std::string& valid = "", const std::string& fix = "");

  /// What is wrong, without the rest. `what()` has all three, a line each.
  const std::string& problem() const noexcept { return problem_; }

 private:
  std::string problem_;
};

/// An argument or request that cannot be served.
class VARIATOR_EXPORT InputError : public Error {
  using Error::Error;
};

/// A bundle on disk that is damaged, incomplete or of an unknown version.
class VARIATOR_EXPORT BundleError : public Error {
  using Error::Error;
};

/// An engine that is missing, stale, unavailable or refused a request.
class VARIATOR_EXPORT EngineError : public Error {
  using Error::Error;
};

/// A request that cannot be answered in time, or was not.
class VARIATOR_EXPORT DeadlineExceeded : public Error {
  using Error::Error;
};

/// A request that was refused because too many are waiting.
class VARIATOR_EXPORT Overloaded : public Error {
  using Error::Error;
};

}  // namespace variator
