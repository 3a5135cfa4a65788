/// Embed two rows of token ids at a ratio: embed BUNDLE [RATIO]
///
/// Your tokenizer turns texts into ids, special tokens included; these two rows stand for two short texts.

#include <cstddef>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include <variator/variator.hpp>

namespace {

const std::vector<variator::Row> kRows = {{{101, 102, 103, 104}}, {{101, 105, 106, 107, 108, 102}}};

void embed(const std::string& bundle, const variator::Key& ratio) {
  variator::Runtime runtime(bundle);
  const variator::Result result = runtime.infer(kRows, ratio);
  std::printf("%s\nratio %s, %s %s, %.2f ms\n", runtime.picked().c_str(), result.ratio.text().c_str(),
              result.engine.c_str(), result.precision.c_str(), result.compute_ms);
  for (const auto& [name, tensor] : result.outputs) {
    for (std::size_t row = 0; row < result.lengths.size(); ++row) {
      const float* values = tensor.row(row);
      std::printf("%s %zu: %.4f %.4f …\n", name.c_str(), row, values[0], values[1]);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count < 2) {
      throw variator::InputError("no bundle is given", "", "embed BUNDLE [RATIO]");
    }
    embed(arguments[1], count > 2 ? variator::Key(arguments[2]) : variator::Key(4));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
