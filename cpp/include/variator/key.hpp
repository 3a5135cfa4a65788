/// What a setting is asked for by: a ratio, or the name of one that is more than a ratio.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "variator/export.h"

namespace variator {

/// A ratio or a name. Made from `4`, `"4"` or `"long"` alike.
class VARIATOR_EXPORT Key {
 public:
  Key(int ratio) : text_(std::to_string(ratio)), ratio_(ratio) {}  // NOLINT(cppcoreguidelines-explicit-constructor): a ratio is one
  Key(std::string text);                                           // NOLINT(cppcoreguidelines-explicit-constructor)
  Key(const char* text) : Key(std::string(text)) {}                // NOLINT(cppcoreguidelines-explicit-constructor)

  /// As it stands in manifests and messages.
  const std::string& text() const noexcept { return text_; }

  /// The ratio; 0 for a name.
  int ratio() const noexcept { return ratio_; }

  /// Ratios ascending, then names.
  bool operator<(const Key& other) const noexcept;
  bool operator==(const Key& other) const noexcept { return text_ == other.text_; }
  bool operator!=(const Key& other) const noexcept { return text_ != other.text_; }

 private:
  std::string text_;
  int ratio_ = 0;
};

/// The ratio that today's load allows.
inline const char* const kAuto = "auto";

/// Keys in words, for messages: `1, 2, 4`.
VARIATOR_EXPORT std::string in_words(const std::vector<Key>& keys);

}  // namespace variator
