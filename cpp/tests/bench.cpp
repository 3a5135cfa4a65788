/// What `Runtime::infer` takes beside ONNX Runtime's own call: bench BUNDLE RATIO ROWSxLENGTH RUNS
///
/// Both are timed in the very same call, because two sessions over one graph differ by more than is looked for: the
/// library's table of functions is replaced by a copy whose `Run` keeps its time. Prints the times as JSON, in µs.

#include <onnxruntime_cxx_api.h>

#include <chrono>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "json.hpp"
#include "rows.hpp"
#include "variator/variator.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using variator::Json;

template <typename Work>
double us(const Work& work) {
  const auto start = Clock::now();
  work();
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

std::vector<variator::Row> rows_of(std::size_t count, std::size_t length, std::int64_t vocabulary) {
  std::vector<variator::Row> rows(count);
  for (std::size_t row = 0; row < count; ++row) {
    for (std::size_t i = 0; i < length; ++i) {
      rows[row].ids.push_back(static_cast<std::int64_t>(7 * row + 13 * i + 5) % vocabulary);
    }
  }
  return rows;
}

/// ONNX Runtime's own functions, and µs that its `Run` took last.
const OrtApi* original = nullptr;  // NOLINT(cppcoreguidelines-avoid-non-const-global-variables): a C function has no state
double run_us = 0.0;               // NOLINT(cppcoreguidelines-avoid-non-const-global-variables)

OrtStatus* ORT_API_CALL timed_run(OrtSession* session, const OrtRunOptions* options, const char* const* taken,
                                  const OrtValue* const* values, std::size_t inputs, const char* const* given,
                                  std::size_t outputs, OrtValue** results) noexcept {
  OrtStatus* status = nullptr;
  run_us = us([&] { status = original->Run(session, options, taken, values, inputs, given, outputs, results); });
  return status;
}

/// Put the copy in place, for every call that this program makes.
void keep_time() {
  original = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  static OrtApi timed = *original;
  timed.Run = timed_run;
  Ort::Global<void>::api_ = &timed;
}

Json bench(const std::string& path, const variator::Key& ratio, const std::string& shape, int runs) {
  variator::OpenOptions options;
  options.engine = "onnxruntime";
  options.verify = false;
  variator::Runtime runtime(path, options);
  const auto cross = shape.find('x');
  const auto rows = rows_of(std::stoul(shape.substr(0, cross)), std::stoul(shape.substr(cross + 1)),
                            runtime.bundle().manifest().vocabulary);
  const auto parts = variator::in_buckets(rows, runtime.bundle().manifest().max_length, {});
  if (parts.size() != 1) {
    throw variator::InputError("a shape that runs in " + std::to_string(parts.size()) + " parts", "one that runs at once");
  }
  std::vector<double> raw;
  std::vector<double> whole;
  for (int turn = -3; turn < runs; ++turn) {
    const double time = us([&] { runtime.infer(rows, ratio); });
    if (turn >= 0) {
      whole.push_back(time);
      raw.push_back(run_us);
    }
  }
  return {{"raw_us", raw},
          {"infer_us", whole},
          {"padded_to", parts[0].length},
          {"precision", runtime.precision()},
          {"engine", runtime.engine()},
          {"onnxruntime", OrtGetApiBase()->GetVersionString()}};
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 5) {
      throw variator::InputError("too few arguments", "BUNDLE RATIO ROWSxLENGTH RUNS");
    }
    keep_time();
    std::cout << bench(arguments[1], arguments[2], arguments[3], std::stoi(arguments[4])).dump() << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
