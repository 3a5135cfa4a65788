#include "variator/key.hpp"

#include <tuple>

#include "variator/errors.hpp"

namespace variator {

namespace {

constexpr std::size_t kLongestNumber = 6;

/// The number that a text is; 0 if it is none.
int number_in(const std::string& text) {
  const bool digits = !text.empty() && text.size() <= kLongestNumber && text[0] != '0' &&
                      text.find_first_not_of("0123456789") == std::string::npos;
  return digits ? std::stoi(text) : 0;
}

}  // namespace

Key::Key(std::string text) : text_(std::move(text)), ratio_(number_in(text_)) {}

bool Key::operator<(const Key& other) const noexcept {
  const bool named = ratio_ == 0;
  const bool other_named = other.ratio_ == 0;
  return std::tie(named, ratio_, text_) < std::tie(other_named, other.ratio_, other.text_);
}

std::string in_words(const std::vector<Key>& keys) {
  std::string words;
  for (const Key& key : keys) {
    words += (words.empty() ? "" : ", ") + key.text();
  }
  return words;
}

}  // namespace variator
