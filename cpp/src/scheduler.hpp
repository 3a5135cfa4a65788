/// What waits, in which order, and what runs next: Python's `engines.scheduler`. Time comes in as an argument.
///
/// Earliest deadline first within a priority of one. A batch takes the first request and those of its length bucket that
/// come next. Requests belong to whoever waits for them; the queue only points to them.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <vector>

#include "variator/policy.hpp"

namespace variator {

/// Lengths that requests are grouped by, for a model that takes `limit` tokens.
std::vector<int> buckets_up_to(int limit);

/// @throws InputError Unless a time can be an objective.
void check_slo(double slo_ms);

/// One request in the queue: rows that are answered together. Times in ms on the scheduler's clock.
struct Request {
  int rows = 1;
  /// Tokens of the longest row.
  int length = 1;
  double arrival = 0.0;
  double deadline = 0.0;
  /// Set by the scheduler.
  int bucket = 0;
  bool waiting = false;
  std::uint64_t number = 0;
};

/// What runs next; `expected_ms` by the latency table.
struct Batch {
  std::vector<Request*> requests;
  int level = 0;
  int rows = 0;
  double expected_ms = 0.0;
};

/// The queue. Not for several threads at once.
class Scheduler {
 public:
  /// @param slo_ms That most requests have; the time to drain the queue is counted in batches that fit it.
  Scheduler(Costs costs, Policy policy, double slo_ms, int max_queue);

  /// Let a request wait.
  ///
  /// @throws InputError If it is longer than any bucket.
  /// @throws DeadlineExceeded If it cannot be answered in time even at the highest ratio.
  /// @throws Overloaded If the queue is full.
  void submit(Request& request, double now);

  /// What runs now, if anything waits; `hopeless` gets the requests that are given up because no ratio is fast enough.
  std::optional<Batch> next_batch(double now, std::vector<Request*>& hopeless);

  /// A batch has ended, sooner or later than expected: what comes next is expected accordingly.
  ///
  /// @param batch None if it failed.
  void done(double now, const Batch* batch, double took_ms);

  /// Take a request out.
  void discard(Request& request);

  /// Who is served next, if anybody waits.
  Request* first() const { return all_.empty() ? nullptr : all_.begin()->second; }

  std::size_t waiting() const noexcept { return all_.size(); }
  const Costs& costs() const noexcept { return costs_; }

 private:
  using Place = std::tuple<double, std::uint64_t>;
  static Place place_of(const Request& request) { return {request.deadline, request.number}; }

  void rest(double now);
  void count(const Request& request, int sign);
  double soonest(const Request& request) const;
  Batch take(Request& first, int level, int most);

  Costs costs_;
  Policy policy_;
  int max_queue_;
  std::vector<std::vector<double>> shares_;
  std::vector<double> drain_ms_;
  std::map<Place, Request*> all_;
  std::vector<std::map<Place, Request*>> groups_;
  std::vector<int> waiting_rows_;
  std::uint64_t numbers_ = 0;
  double busy_until_, rested_;
  double pace_ = 1.0, took_, expected_;
};

}  // namespace variator
