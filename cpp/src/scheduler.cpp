#include "scheduler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace variator {

namespace {

constexpr int kBuckets[] = {8,   12,  16,  20,  24,  28,  32,  40,  48,  56,   64,   80,   96,   112,  128,  160, 192,
                            224, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 6144};

/// What a run's latency is multiplied by where a batch is cut so that its first request is in time.
constexpr double kMargin = 1.05;

/// Memory of the pace, in ms of expected work, and what it may be: one run that hangs says nothing about the next.
constexpr double kPaceMs = 1000.0;
constexpr double kSlowestPace = 4.0;
constexpr double kFastestPace = 0.5;

constexpr double kMaxSloMs = 3600000.0;

/// Rows x length of one batch.
constexpr int kMaxTokens = 16384;

constexpr double kNever = -std::numeric_limits<double>::infinity();

std::string in_ms(double time) {
  const std::string text = std::to_string(time);
  return text.substr(0, text.find('.') + 2) + " ms";
}

std::size_t at(int index) { return static_cast<std::size_t>(index); }

}  // namespace

std::vector<int> buckets_up_to(int limit) {
  std::vector<int> found;
  std::copy_if(std::begin(kBuckets), std::end(kBuckets), std::back_inserter(found),
               [limit](int bucket) { return bucket < limit; });
  found.push_back(limit);
  return found;
}

void check_slo(double slo_ms) {
  const bool fits = slo_ms > 0 && slo_ms <= kMaxSloMs;
  if (!fits) {
    throw InputError("an SLO of " + std::to_string(slo_ms) + " ms", "more than 0, up to 3600000 ms");
  }
}

Scheduler::Scheduler(Costs costs, Policy policy, double slo_ms, int max_queue)
    : costs_(std::move(costs)),
      policy_(std::move(policy)),
      max_queue_(max_queue),
      drain_ms_(at(costs_.levels()), 0.0),
      groups_(costs_.buckets().size()),
      waiting_rows_(costs_.buckets().size(), 0),
      busy_until_(kNever),
      rested_(kNever),
      took_(kPaceMs),
      expected_(kPaceMs) {
  check_slo(slo_ms);
  for (int level = 0; level < costs_.levels(); ++level) {
    std::vector<double> shares;
    shares.reserve(costs_.buckets().size());
    for (int bucket = 0; bucket < static_cast<int>(costs_.buckets().size()); ++bucket) {
      shares.push_back(costs_.share(slo_ms, level, bucket));
    }
    shares_.push_back(std::move(shares));
  }
}

void Scheduler::submit(Request& request, double now) {
  rest(now);
  const std::vector<int>& buckets = costs_.buckets();
  if (request.length < 1 || request.length > buckets.back()) {
    throw InputError("a row of " + std::to_string(request.length) + " tokens", "1 to " + std::to_string(buckets.back()));
  }
  if (static_cast<int>(all_.size()) >= max_queue_) {
    throw Overloaded(std::to_string(all_.size()) + " requests are waiting", "", "try again later, or send less");
  }
  request.bucket =
      static_cast<int>(std::lower_bound(buckets.begin(), buckets.end(), request.length) - buckets.begin());
  const double least = costs_.ms(costs_.levels() - 1, request.rows, request.bucket) * pace_;
  if (std::max(now, busy_until_) + least > request.deadline) {
    throw DeadlineExceeded("a deadline in " + in_ms(request.deadline - now) + " cannot be met: " +
                               std::to_string(request.rows) + " rows of up to " + std::to_string(request.length) +
                               " tokens take " + in_ms(least) + " at ratio " + costs_.ratios().back().text() + ", and " +
                               in_ms(std::max(0.0, busy_until_ - now)) + " are spoken for",
                           "", "allow more time");
  }
  request.number = numbers_++;
  request.waiting = true;
  all_.emplace(place_of(request), &request);
  groups_[at(request.bucket)].emplace(place_of(request), &request);
  count(request, 1);
}

void Scheduler::count(const Request& request, int sign) {
  const int rows = sign * request.rows;
  waiting_rows_[at(request.bucket)] += rows;
  for (std::size_t level = 0; level < drain_ms_.size(); ++level) {
    drain_ms_[level] += rows * shares_[level][at(request.bucket)];
  }
  if (all_.empty()) {  // nothing is left of rounding either
    std::fill(drain_ms_.begin(), drain_ms_.end(), 0.0);
  }
}

void Scheduler::discard(Request& request) {
  if (!request.waiting) {
    return;
  }
  request.waiting = false;
  all_.erase(place_of(request));
  groups_[at(request.bucket)].erase(place_of(request));
  count(request, -1);
}

std::optional<Batch> Scheduler::next_batch(double now, std::vector<Request*>& hopeless) {
  Request* head = first();
  while (head != nullptr && now + soonest(*head) > head->deadline) {
    discard(*head);
    hopeless.push_back(head);
    head = first();
  }
  if (head == nullptr) {
    return std::nullopt;
  }
  const Queue queue{{head->arrival, head->deadline, head->bucket, head->rows},
                    waiting_rows_[at(head->bucket)],
                    drain_ms_,
                    pace_};
  const Decision chosen = policy_(queue, costs_, now);
  const std::vector<double>& line = costs_.line(chosen.level, head->bucket);
  const double left = (head->deadline - now) / (kMargin * pace_);
  const auto in_time = static_cast<int>(std::upper_bound(line.begin(), line.end(), left) - line.begin()) - 1;
  const int of_tokens = std::max(1, kMaxTokens / costs_.buckets()[at(head->bucket)]);
  Batch batch = take(*head, chosen.level, std::min({chosen.rows, in_time, of_tokens}));
  busy_until_ = now + batch.expected_ms * pace_;
  return batch;
}

/// ms until a request could be answered, in as large a batch as the queue needs now: who cannot make a full batch is
/// given up for those behind it.
double Scheduler::soonest(const Request& request) const {
  const int last = costs_.levels() - 1;
  const int cap = costs_.cap(request.deadline - request.arrival, last, request.bucket);
  const int rows = std::max(std::min(waiting_rows_[at(request.bucket)], cap), request.rows);
  return costs_.ms(last, rows, request.bucket) * pace_;
}

/// Requests of the first one's group, itself in any case.
Batch Scheduler::take(Request& first, int level, int most) {
  Batch batch{{}, level, 0, 0.0};
  int aside = 0;
  const auto& group = groups_[at(first.bucket)];
  for (auto entry = group.begin(); entry != group.end() && (batch.rows < most || batch.requests.empty());) {
    Request& request = *(entry++)->second;  // on before it is taken out
    if (&request == &first || batch.rows + request.rows <= most) {
      batch.requests.push_back(&request);
      batch.rows += request.rows;
      discard(request);
    } else if (++aside > most) {
      break;
    }
  }
  batch.expected_ms = costs_.ms(level, batch.rows, first.bucket);
  return batch;
}

void Scheduler::done(double now, const Batch* batch, double took_ms) {
  busy_until_ = now;
  if (batch != nullptr) {
    const double kept = std::exp(-batch->expected_ms / kPaceMs);
    const double took = std::clamp(took_ms, kFastestPace * batch->expected_ms, kSlowestPace * batch->expected_ms);
    took_ = took_ * kept + took;
    expected_ = expected_ * kept + batch->expected_ms;
    pace_ = took_ / expected_;
  }
}

/// Time in which nothing ran tells nothing: the pace goes back to the table's.
void Scheduler::rest(double now) {
  const double idle = now - std::max(rested_, busy_until_);
  if (idle > 0 && all_.empty()) {
    pace_ = 1 + (pace_ - 1) * std::exp(-idle / kPaceMs);
    took_ = pace_ * expected_;
    rested_ = now;
  }
}

}  // namespace variator
