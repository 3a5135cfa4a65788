/// Engines on disk: which of a bundle's can be run here, and loading one. What `engines.built` is in Python.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "variator/engine.hpp"
#include "variator/latency.hpp"

namespace variator {

/// An engine on disk that belongs to this bundle and this machine.
struct BuiltEngine {
  std::filesystem::path directory;
  EngineRecord record;
  const Backend* backend = nullptr;
};

/// The built engine to serve with, and why it was picked. `auto` takes the fastest by the probe; int8 and fp8 cost
/// quality and are used only when asked for.
///
/// @throws InputError For an unknown backend.
/// @throws EngineError If none that is built fits; says how to build one.
std::pair<BuiltEngine, std::string> find_built(const Bundle& bundle, const std::string& engine,
                                               const std::string& precision);

/// Hash what one graph of a built engine will read, and load it.
///
/// @throws EngineError, BundleError If a file has changed, or the precision is not what the record says.
std::unique_ptr<Engine> load_engine(const Bundle& bundle, const BuiltEngine& built, const std::string& graph,
                                    int threads);

/// The latency table of a built engine.
///
/// @throws EngineError If there is none, it is damaged, or it was measured with another engine, machine or threads.
LatencyTable load_table(const BuiltEngine& built, int threads);

}  // namespace variator
