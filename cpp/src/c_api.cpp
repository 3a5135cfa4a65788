#include <exception>
#include <string>
#include <vector>

#include "variator/runtime.hpp"
#include "variator/variator.h"

struct variator_runtime {
  variator::Runtime runtime;
  std::string ratios;
};

struct variator_result {
  variator::Result result;
  std::vector<variator_tensor> tensors;
};

namespace {

using variator::InputError;

/// What went wrong last on this thread.
std::string& last_error() noexcept {
  thread_local std::string words;
  return words;
}

variator_status told(const std::exception& error, variator_status status) noexcept {
  try {
    last_error() = error.what();
  } catch (...) {  // no memory for the words
    last_error().clear();
  }
  return status;
}

/// Do something, and turn what it throws into a status: no exception may reach C.
template <typename Work>
variator_status guarded(const Work& work) noexcept {
  try {
    work();
    return VARIATOR_OK;
  } catch (const InputError& error) {
    return told(error, VARIATOR_INPUT_ERROR);
  } catch (const variator::BundleError& error) {
    return told(error, VARIATOR_BUNDLE_ERROR);
  } catch (const variator::EngineError& error) {
    return told(error, VARIATOR_ENGINE_ERROR);
  } catch (const variator::DeadlineExceeded& error) {
    return told(error, VARIATOR_DEADLINE_EXCEEDED);
  } catch (const variator::Overloaded& error) {
    return told(error, VARIATOR_OVERLOADED);
  } catch (const std::exception& error) {
    return told(error, VARIATOR_FAILED);
  } catch (...) {
    return VARIATOR_FAILED;
  }
}

void check_given(const void* pointer, const char* name) {
  if (pointer == nullptr) {
    throw InputError(std::string(name) + " is NULL");
  }
}

variator::OpenOptions options_of(const variator_open_options* given) {
  variator::OpenOptions options;
  if (given != nullptr) {
    check_given(given->engine, "engine");
    check_given(given->precision, "precision");
    check_given(given->policy, "policy");
    options.engine = given->engine;
    options.precision = given->precision;
    options.threads = given->threads;
    options.verify = given->verify != 0;
    options.policy = given->policy;
    options.slo_ms = given->slo_ms;
    options.max_queue = given->max_queue;
  }
  return options;
}

std::vector<variator::Row> rows_of(const int64_t* ids, const int64_t* types, const size_t* lengths, size_t rows) {
  std::vector<variator::Row> found;
  found.reserve(rows);
  for (size_t row = 0; row < rows; ++row) {
    found.push_back({{ids, ids + lengths[row]}, {}});
    ids += lengths[row];
    if (types != nullptr) {
      found.back().types.assign(types, types + lengths[row]);
      types += lengths[row];
    }
  }
  return found;
}

std::vector<variator_tensor> tensors_of(const variator::Result& result) {
  std::vector<variator_tensor> tensors;
  for (const auto& [name, tensor] : result.outputs) {
    tensors.push_back({name.c_str(), tensor.values.data(), tensor.shape.data(), tensor.shape.size()});
  }
  return tensors;
}

}  // namespace

int variator_abi(void) { return VARIATOR_ABI; }

const char* variator_version(void) { return VARIATOR_VERSION; }

const char* variator_last_error(void) { return last_error().c_str(); }

void variator_open_defaults(variator_open_options* options) {
  static const variator::OpenOptions defaults;
  *options = {defaults.engine.c_str(), defaults.precision.c_str(), defaults.threads, defaults.verify ? 1 : 0,
              defaults.policy.c_str(), defaults.slo_ms,            defaults.max_queue};
}

variator_status variator_open(const char* bundle, const variator_open_options* options, variator_runtime** runtime) {
  return guarded([&] {
    check_given(runtime, "runtime");
    *runtime = nullptr;
    check_given(bundle, "bundle");
    variator::Runtime opened(bundle, options_of(options));
    std::string ratios;
    for (const variator::Key& ratio : opened.bundle().ratios()) {
      ratios += (ratios.empty() ? "" : " ") + ratio.text();
    }
    *runtime = new variator_runtime{std::move(opened), std::move(ratios)};
  });
}

void variator_close(variator_runtime* runtime) { delete runtime; }

const char* variator_ratios(const variator_runtime* runtime) { return runtime->ratios.c_str(); }

variator_status variator_infer(variator_runtime* runtime, const int64_t* ids, const int64_t* types,
                               const size_t* lengths, size_t rows, const char* ratio, double slo_ms,
                               variator_result** result) {
  return guarded([&] {
    check_given(result, "result");
    *result = nullptr;
    check_given(runtime, "runtime");
    check_given(ids, "ids");
    check_given(lengths, "lengths");
    check_given(ratio, "ratio");
    variator::InferOptions options;
    if (slo_ms != 0.0) {
      options.slo_ms = slo_ms;
    }
    auto found = std::make_unique<variator_result>();
    found->result = runtime->runtime.infer(rows_of(ids, types, lengths, rows), ratio, options);
    found->tensors = tensors_of(found->result);
    *result = found.release();
  });
}

void variator_about_result(const variator_result* result, variator_about* about) {
  const variator::Result& found = result->result;
  *about = {found.ratio.text().c_str(), found.engine.c_str(), found.precision.c_str(), result->tensors.size(),
            found.load_ms,              found.queue_ms,       found.compute_ms,        found.expected_quality};
}

variator_status variator_output(const variator_result* result, size_t index, variator_tensor* tensor) {
  return guarded([&] {
    check_given(result, "result");
    check_given(tensor, "tensor");
    if (index >= result->tensors.size()) {
      throw InputError("output " + std::to_string(index), "below " + std::to_string(result->tensors.size()));
    }
    *tensor = result->tensors[index];
  });
}

void variator_result_close(variator_result* result) { delete result; }
