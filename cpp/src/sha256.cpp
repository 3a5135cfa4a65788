#include "sha256.hpp"

#include <cstring>
#include <fstream>
#include <vector>

#include "variator/errors.hpp"

namespace variator {

namespace {

constexpr std::size_t kBlock = 64;
constexpr std::size_t kChunk = std::size_t{1} << 20U;

constexpr std::array<std::uint32_t, 64> kRound = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr std::uint32_t rotated(std::uint32_t value, unsigned by) { return (value >> by) | (value << (32U - by)); }

/// The state of the hash, block by block.
class Sha256 {
 public:
  void add(std::string_view bytes) {
    total_ += bytes.size();
    while (!bytes.empty()) {
      if (held_ == 0 && bytes.size() >= kBlock) {
        compress(bytes.substr(0, kBlock));
        bytes.remove_prefix(kBlock);
        continue;
      }
      const std::size_t taken = std::min(kBlock - held_, bytes.size());
      std::memcpy(&buffer_[held_], bytes.data(), taken);
      held_ += taken;
      bytes.remove_prefix(taken);
      if (held_ == kBlock) {
        compress(std::string_view(buffer_.data(), kBlock));
        held_ = 0;
      }
    }
  }

  std::string hex() {
    const std::uint64_t bits = total_ * 8;
    add(std::string_view("\x80", 1));
    while (held_ != kBlock - 8) {
      add(std::string_view("\0", 1));
    }
    std::array<char, 8> length{};
    for (unsigned i = 0; i < 8; ++i) {
      length[i] = static_cast<char>(bits >> (56U - 8U * i));
    }
    add(std::string_view(length.data(), length.size()));
    std::string text;
    for (const std::uint32_t word : state_) {
      for (unsigned shift = 32; shift > 0; shift -= 4) {
        text += "0123456789abcdef"[(word >> (shift - 4U)) & 15U];
      }
    }
    return text;
  }

 private:
  void compress(std::string_view block) {
    std::array<std::uint32_t, 64> words{};
    for (std::size_t i = 0; i < 16; ++i) {
      for (std::size_t j = 0; j < 4; ++j) {
        words[i] = words[i] << 8U | static_cast<unsigned char>(block[4 * i + j]);
      }
    }
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t a = words[i - 15];
      const std::uint32_t b = words[i - 2];
      words[i] = words[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ (a >> 3U)) + words[i - 7] +
                 (rotated(b, 17) ^ rotated(b, 19) ^ (b >> 10U));
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t one =
          h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + words[i];
      const std::uint32_t two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g;
      g = f;
      f = e;
      e = d + one;
      d = c;
      c = b;
      b = a;
      a = one + two;
    }
    const std::array<std::uint32_t, 8> found = {a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < found.size(); ++i) {
      state_[i] += found[i];
    }
  }

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<char, kBlock> buffer_{};
  std::size_t held_ = 0;
  std::uint64_t total_ = 0;
};

}  // namespace

std::string sha256_of(std::string_view bytes) {
  Sha256 hash;
  hash.add(bytes);
  return hash.hex();
}

std::string sha256_of_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> chunk(kChunk);
  Sha256 hash;
  while (file) {
    file.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    hash.add(std::string_view(chunk.data(), static_cast<std::size_t>(file.gcount())));
  }
  if (!file.eof()) {
    throw BundleError(path.string() + " cannot be read", "", "copy the bundle again, or export again");
  }
  return hash.hex();
}

}  // namespace variator
