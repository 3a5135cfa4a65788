/// Engines by graph, each loaded when it is first asked for.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "variator/engine.hpp"

namespace variator {

/// Threads may share it: who asks for a graph waits for that one's load and for no other.
class Loaded {
 public:
  using Load = std::function<std::unique_ptr<Engine>(const std::string& graph)>;

  Loaded(const std::vector<std::string>& graphs, Load load) : load_(std::move(load)) {
    for (const std::string& graph : graphs) {
      slots_.try_emplace(graph);
    }
  }

  /// The engine of one of the graphs; whatever a load throws, the next call tries again.
  Engine& at(const std::string& graph) {
    Slot& slot = slots_.at(graph);
    const std::scoped_lock hold(slot.lock);
    if (!slot.engine) {
      slot.engine = load_(graph);
    }
    return *slot.engine;
  }

 private:
  struct Slot {
    std::mutex lock;
    std::unique_ptr<Engine> engine;
  };

  Load load_;
  std::map<std::string, Slot> slots_;
};

}  // namespace variator
