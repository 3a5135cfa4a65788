/// Ratio `auto`: calls that wait at the same time share batches, at the ratio that the policy gives.
///
/// There is no thread of its own: of the callers that wait one leads, which computes batches for all until its own
/// request is answered, and hands the lead on to whoever is served next.
#pragma once

#include <functional>
#include <mutex>

#include "scheduler.hpp"
#include "variator/runtime.hpp"

namespace variator {

/// What a batch gave: outputs of all its rows, ms in the engine.
struct Computed {
  Outputs outputs;
  double compute_ms = 0.0;
};

/// Computes rows as one batch at a ratio, padded to the longest.
using Compute = std::function<Computed(const Key& ratio, const std::vector<Row>& rows)>;

/// The queue. Threads may share it.
class AutoQueue {
 public:
  AutoQueue(Scheduler scheduler, Compute compute);

  /// Answer rows that have been checked. Fills `outputs`, `lengths`, `ratio` and the times.
  ///
  /// @throws DeadlineExceeded, Overloaded, EngineError
  Result infer(std::vector<Row> rows, double slo_ms);

  /// Requests that wait for a batch.
  std::size_t waiting();

 private:
  struct Waiter;

  static Waiter& waiter_of(Request& request);
  void lead(std::unique_lock<std::mutex>& lock);
  void serve(Batch& batch, std::unique_lock<std::mutex>& lock);
  void hand_on();

  std::mutex mutex_;
  Scheduler scheduler_;
  Compute compute_;
  bool busy_ = false;
};

}  // namespace variator
