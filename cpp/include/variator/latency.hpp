/// How long a run takes here: the table that `variator bench --calibrate` measures, asked by policies.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "variator/errors.hpp"
#include "variator/key.hpp"

namespace variator {

/// Most rows that a table is asked about.
inline constexpr int kMaxRows = 64;

/// One measured shape; ms.
struct Point {
  Key ratio = 1;
  int batch = 0;
  int length = 0;
  double p50_ms = 0.0;
};

/// Latency of one engine on one machine, for any rows and length.
///
/// Noise is smoothed away first: more rows or longer ones never take less time. Between measured points it is linear, in
/// rows and in tokens; beyond the most rows it goes on with the cost of a row there, beyond the longest with the cost of
/// a token. The same figures as Python's `engines.latency`, bit by bit.
class VARIATOR_EXPORT LatencyTable {
 public:
  /// @throws EngineError If there is no point, no ratio 1, or a time or size that cannot be.
  explicit LatencyTable(std::vector<Point> points);

  /// Read one as Python keeps it.
  ///
  /// @throws EngineError If it is none.
  static LatencyTable from_json(const std::string& text);

  /// Slowest first: 1, then whatever is faster at the largest shape that all have.
  const std::vector<Key>& ratios() const noexcept { return ratios_; }

  /// ms of 0, 1, 2 … `kMaxRows` rows of `length` tokens; for 0 it is 0.
  ///
  /// @throws InputError For a ratio that was not measured.
  std::vector<double> line(const Key& ratio, int length) const;

  /// Of which engine, and what the figures depend on: processor, cores, threads.
  const std::string& key() const noexcept { return key_; }
  const std::map<std::string, std::string>& machine() const noexcept { return machine_; }

 private:
  struct Grid {
    std::vector<int> batches, lengths;
    std::vector<std::vector<double>> values;
  };
  static Grid grid_of(const std::vector<Point>& points);

  std::vector<Key> ratios_;
  std::map<Key, Grid> grids_;
  std::string key_;
  std::map<std::string, std::string> machine_;
};

/// ms of a number of rows, from those of 0 to `kMaxRows`; beyond in proportion.
VARIATOR_EXPORT double of_rows(const std::vector<double>& line, int rows);

}  // namespace variator
