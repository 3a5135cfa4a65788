/// Embed two rows of token ids at a ratio: embed BUNDLE [RATIO]
///
/// Your tokenizer turns texts into ids, special tokens included; these two rows stand for two short texts.

#include <cstddef>
#include <exception>
#include <iomanip>
#include <iostream>
#include <string>
#include <vector>

#include <variator/variator.hpp>

namespace {

void embed(const std::string& bundle, const variator::Key& ratio) {
  variator::Runtime runtime(bundle);
  const std::vector<variator::Row> rows = {{{101, 102, 103, 104}}, {{101, 105, 106, 107, 108, 102}}};
  const variator::Result result = runtime.infer(rows, ratio);
  std::cout << runtime.picked() << "\nratio " << result.ratio.text() << ", " << result.engine << " " << result.precision
            << ", " << result.compute_ms << " ms\n"
            << std::fixed << std::setprecision(4);
  for (const auto& [name, tensor] : result.outputs) {
    for (std::size_t row = 0; row < result.lengths.size(); ++row) {
      const float* values = tensor.row(row);
      std::cout << name << " " << row << ": " << values[0] << " " << values[1] << " …\n";
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
    std::cerr << error.what() << "\n";
    return 1;
  }
}
