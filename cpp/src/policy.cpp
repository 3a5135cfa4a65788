#include "variator/policy.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <utility>

namespace variator {

namespace {

/// Of its SLO that a single run may take: a request that just missed one batch still makes the next.
constexpr double kBatchShare = 1.0 / 3.0;

/// A batch is full when a row costs no more than this many times what it costs at best.
constexpr double kEfficient = 1.1;

/// To a tenth of a ms, as Python rounds: by the exact decimal value, to even.
double to_tenths(double value) {
  char text[352];  // the longest finite number takes 312 characters
  std::snprintf(text, sizeof text, "%.1f", value);  // NOLINT(cppcoreguidelines-pro-type-vararg)
  return std::strtod(text, nullptr);
}

/// Rows of a full batch, from its latency by rows.
int cap_of(const std::vector<double>& line, int max_rows, double slo_ms) {
  const double limit = slo_ms * kBatchShare;
  std::vector<int> within;
  for (int rows = 1; rows <= max_rows; ++rows) {
    if (line[static_cast<std::size_t>(rows)] <= limit) {
      within.push_back(rows);
    }
  }
  if (within.empty()) {
    return 1;
  }
  const auto per_row = [&line](int rows) { return line[static_cast<std::size_t>(rows)] / rows; };
  double best = per_row(within.front());
  for (const int rows : within) {
    best = std::min(best, per_row(rows));
  }
  return *std::find_if(within.begin(), within.end(), [&](int rows) { return per_row(rows) <= best * kEfficient; });
}

double slo_of(const Head& head) { return head.deadline - head.arrival; }

}  // namespace

Costs::Costs(const LatencyTable& table, const std::vector<Key>& ratios, std::vector<int> buckets, int max_rows)
    : buckets_(std::move(buckets)), max_rows_(std::min(max_rows, kMaxRows)) {
  for (const Key& ratio : ratios) {
    static_cast<void>(table.line(ratio, 1));  // says which was not measured
  }
  for (const Key& ratio : table.ratios()) {
    if (std::find(ratios.begin(), ratios.end(), ratio) == ratios.end()) {
      continue;
    }
    ratios_.push_back(ratio);
    std::vector<std::vector<double>> level;
    level.reserve(buckets_.size());
    for (const int length : buckets_) {
      level.push_back(table.line(ratio, length));
    }
    lines_.push_back(std::move(level));
  }
}

int Costs::cap(double slo_ms, int level, int bucket) const {
  return cap_of(line(level, bucket), max_rows_, to_tenths(slo_ms));
}

double Costs::share(double slo_ms, int level, int bucket) const {
  const int rows = cap(slo_ms, level, bucket);
  return line(level, bucket)[static_cast<std::size_t>(rows)] / rows;
}

Decision fixed(const Queue& queue, const Costs& costs, double /*now*/, int level) {
  return {level, costs.cap(slo_of(queue.head), level, queue.head.bucket)};
}

Decision thresholds(const Queue& queue, const Costs& costs, double /*now*/, const std::vector<double>& shares) {
  const double slo = slo_of(queue.head);
  const double work = queue.drain_ms[0] * queue.pace;
  const auto passed = std::count_if(shares.begin(), shares.end(), [&](double share) { return work > share * slo; });
  const int level = std::min(static_cast<int>(passed), costs.levels() - 1);
  return {level, costs.cap(slo, level, queue.head.bucket)};
}

Decision slackfit(const Queue& queue, const Costs& costs, double now, int bins) {
  const Head& head = queue.head;
  const double slack = (head.deadline - now) / queue.pace;
  const double slo = slo_of(head) / queue.pace;
  // Several rows of the queue at once, as many as there are: a larger batch than that does not exist.
  const int least = std::min(head.rows, costs.max_rows());
  const int most = std::max(least, std::min(queue.waiting, costs.max_rows()));
  const double low = costs.line(costs.levels() - 1, head.bucket)[1];
  const double width = std::max(slo - low, 1e-9) / bins;
  std::optional<std::tuple<double, int, int>> best;  // latency bin, rows, -level
  for (int level = 0; level < costs.levels(); ++level) {
    const std::vector<double>& line = costs.line(level, head.bucket);
    int rows = most;
    while (rows > least && line[static_cast<std::size_t>(rows)] > slack) {
      --rows;
    }
    const double time = line[static_cast<std::size_t>(rows)];
    if (time <= slack) {
      const std::tuple<double, int, int> found = {std::trunc((time - low) / width), rows, -level};
      best = best ? std::max(*best, found) : found;
    }
  }
  return best ? Decision{-std::get<2>(*best), std::get<1>(*best)} : Decision{costs.levels() - 1, 1};
}

Decision drain(const Queue& queue, const Costs& costs, double now, double alpha, double margin) {
  const Head& head = queue.head;
  const double slo = slo_of(head);
  const double soon = alpha * slo / queue.pace;
  const double slack = (head.deadline - now) / (margin * queue.pace);
  const int last = costs.levels() - 1;
  for (int level = 0; level < last; ++level) {
    if (queue.drain_ms[static_cast<std::size_t>(level)] <= soon) {
      const int cap = costs.cap(slo, level, head.bucket);
      if (costs.ms(level, std::max(head.rows, std::min(cap, queue.waiting)), head.bucket) <= slack) {
        return {level, cap};
      }
    }
  }
  return {last, costs.cap(slo, last, head.bucket)};
}

Policy policy_named(const std::string& text, const std::vector<Key>& ratios) {
  if (text == "drain") {
    return [](const Queue& queue, const Costs& costs, double now) { return drain(queue, costs, now); };
  }
  if (text == "slackfit") {
    return [](const Queue& queue, const Costs& costs, double now) { return slackfit(queue, costs, now); };
  }
  if (text == "thresholds") {
    return [](const Queue& queue, const Costs& costs, double now) { return thresholds(queue, costs, now); };
  }
  std::string valid = "drain, slackfit, thresholds";
  for (std::size_t index = 0; index < ratios.size(); ++index) {
    const std::string name = "fixed(" + ratios[index].text() + ")";
    if (text == name) {
      const int level = static_cast<int>(index);
      return [level](const Queue& queue, const Costs& costs, double now) { return fixed(queue, costs, now, level); };
    }
    valid += ", " + name;
  }
  throw InputError("no policy '" + text + "'", valid);
}

}  // namespace variator
