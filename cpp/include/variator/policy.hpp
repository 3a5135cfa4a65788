/// Which ratio the next batch runs at, and how many rows it takes: pure functions over (queue, costs, now).
///
/// A policy sees the queue's head (the request that is served next), the rows that wait, and what runs cost. It has no
/// clock and no memory, and decides as Python's `engines.policies` does, state by state. Levels are the ratios from
/// slowest to fastest: level 0 is ratio 1. Times are in ms.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "variator/latency.hpp"

namespace variator {

/// A latency table as policies ask it: by level, rows and length bucket, without a search.
class VARIATOR_EXPORT Costs {
 public:
  /// @param ratios That may be chosen.
  /// @param buckets Lengths that requests are grouped by.
  /// @param max_rows Most rows of a batch.
  /// @throws InputError If a ratio was not measured.
  Costs(const LatencyTable& table, const std::vector<Key>& ratios, std::vector<int> buckets, int max_rows = kMaxRows);

  /// Most rows of a batch, at least 1: a run takes no more than a third of the SLO, and no batch is larger than it takes
  /// to be efficient.
  int cap(double slo_ms, int level, int bucket) const;

  /// ms that a row of a full batch takes.
  double share(double slo_ms, int level, int bucket) const;

  /// A run's latency.
  double ms(int level, int rows, int bucket) const { return of_rows(line(level, bucket), rows); }

  /// ms by rows.
  const std::vector<double>& line(int level, int bucket) const {
    return lines_[static_cast<std::size_t>(level)][static_cast<std::size_t>(bucket)];
  }

  int levels() const noexcept { return static_cast<int>(ratios_.size()); }
  const std::vector<Key>& ratios() const noexcept { return ratios_; }
  const std::vector<int>& buckets() const noexcept { return buckets_; }
  int max_rows() const noexcept { return max_rows_; }

 private:
  std::vector<Key> ratios_;
  std::vector<int> buckets_;
  int max_rows_;
  std::vector<std::vector<std::vector<double>>> lines_;
};

/// The request that is served next.
struct Head {
  double arrival = 0.0;
  double deadline = 0.0;
  /// Index of its length among `Costs::buckets`.
  int bucket = 0;
  int rows = 1;
};

/// What waits.
struct Queue {
  Head head;
  /// Rows that can go into the head's batch.
  int waiting = 1;
  /// Time to serve all that waits, by level, in full batches, by the table.
  std::vector<double> drain_ms;
  /// What runs take at present, over what the table says.
  double pace = 1.0;
};

/// Level and most rows of the next batch.
struct Decision {
  int level = 0;
  int rows = 1;
};

/// Decides.
using Policy = std::function<Decision(const Queue&, const Costs&, double now)>;

/// Always the same level.
VARIATOR_EXPORT Decision fixed(const Queue& queue, const Costs& costs, double now, int level);

/// A level per amount of waiting work: what an operator would set by hand.
///
/// @param shares Level 1 from this share of the SLO on that it would take to serve the queue at ratio 1, level 2 from the
///   next, …; the last goes for all further levels.
VARIATOR_EXPORT Decision thresholds(const Queue& queue, const Costs& costs, double now,
                                    const std::vector<double>& shares = {0.25, 0.5, 1.0});

/// SuperServe's policy (Khare et al., arXiv 2312.16733, section 4): the head's slack picks the largest feasible bucket of
/// latencies; in it the largest batch, and of those the most accurate.
///
/// @param bins Buckets that latencies are sorted into, evenly between the shortest and the longest.
VARIATOR_EXPORT Decision slackfit(const Queue& queue, const Costs& costs, double now, int bins = 12);

/// The lowest ratio at which the head is in time and the whole queue is served soon; else the highest.
///
/// @param alpha Share of the SLO that serving all that waits may take.
/// @param margin What a run's measured latency is multiplied by.
VARIATOR_EXPORT Decision drain(const Queue& queue, const Costs& costs, double now, double alpha = 0.4, double margin = 1.1);

/// `drain`, `slackfit`, `thresholds`, or `fixed(4)` for one of the ratios.
///
/// @throws InputError If it is none of them.
VARIATOR_EXPORT Policy policy_named(const std::string& text, const std::vector<Key>& ratios);

}  // namespace variator
