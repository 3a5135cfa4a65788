#include "auto_queue.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <utility>

#include "rows.hpp"

namespace variator {

namespace {

using Clock = std::chrono::steady_clock;
using Ms = std::chrono::duration<double, std::milli>;

double clock_ms() { return std::chrono::duration_cast<Ms>(Clock::now().time_since_epoch()).count(); }

Clock::time_point point_of(double clock) {
  return Clock::time_point(std::chrono::duration_cast<Clock::duration>(Ms(clock)));
}

std::exception_ptr too_late(const Request& request, double now) {
  return std::make_exception_ptr(DeadlineExceeded("the request waited " + std::to_string(now - request.arrival) +
                                                      " ms of " + std::to_string(request.deadline - request.arrival) +
                                                      " ms",
                                                  "", "send less, or allow more"));
}

/// Some rows of a batch's outputs, token outputs up to each row's length.
Outputs part_of(const Outputs& whole, std::size_t first, const std::vector<std::int64_t>& lengths, const Key& ratio) {
  Outputs outputs;
  std::vector<std::size_t> places(lengths.size());
  for (std::size_t index = 0; index < places.size(); ++index) {
    places[index] = index;
  }
  for (const auto& [name, tensor] : whole) {
    std::vector<std::int64_t> shape = tensor.shape;
    shape[0] = static_cast<std::int64_t>(lengths.size());
    place(outputs, name, shape, tensor.row(first), places, lengths);
    const std::vector<float>& values = outputs[name].values;
    if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
      throw EngineError("the engine's " + name + " at ratio " + ratio.text() + " is not finite", "", "use another ratio");
    }
  }
  return outputs;
}

}  // namespace

/// A call that waits, on its own stack.
struct AutoQueue::Waiter : Request {
  std::vector<Row> rows_given;
  std::condition_variable wake;
  bool answered = false;
  Result result;
  std::exception_ptr error;

  /// Answer it; it goes when the lock does.
  void settle(std::exception_ptr why = nullptr) {
    error = std::move(why);
    answered = true;
    wake.notify_one();
  }
};

/// The call that a request belongs to: the queue holds no others.
AutoQueue::Waiter& AutoQueue::waiter_of(Request& request) {
  return static_cast<Waiter&>(request);  // NOLINT(cppcoreguidelines-pro-type-static-cast-downcast)
}

AutoQueue::AutoQueue(Scheduler scheduler, Compute compute)
    : scheduler_(std::move(scheduler)), compute_(std::move(compute)) {}

Result AutoQueue::infer(std::vector<Row> rows, double slo_ms) {
  check_slo(slo_ms);
  Waiter waiter;
  waiter.result.lengths = lengths_of(rows);
  waiter.rows = static_cast<int>(rows.size());
  waiter.length = static_cast<int>(*std::max_element(waiter.result.lengths.begin(), waiter.result.lengths.end()));
  waiter.rows_given = std::move(rows);
  waiter.arrival = clock_ms();
  waiter.deadline = waiter.arrival + slo_ms;
  std::unique_lock<std::mutex> lock(mutex_);
  scheduler_.submit(waiter, clock_ms());
  while (!waiter.answered) {
    if (!busy_) {
      lead(lock);
    } else if (waiter.waiting) {
      waiter.wake.wait_until(lock, point_of(waiter.deadline));
      if (waiter.waiting && clock_ms() > waiter.deadline) {
        scheduler_.discard(waiter);
        waiter.settle(too_late(waiter, clock_ms()));
      }
    } else {  // its batch runs
      waiter.wake.wait(lock);
    }
  }
  hand_on();
  lock.unlock();
  if (waiter.error) {
    std::rethrow_exception(waiter.error);
  }
  return std::move(waiter.result);
}

std::size_t AutoQueue::waiting() {
  const std::scoped_lock hold(mutex_);
  return scheduler_.waiting();
}

/// Compute one batch.
void AutoQueue::lead(std::unique_lock<std::mutex>& lock) {
  std::vector<Request*> hopeless;
  std::optional<Batch> batch = scheduler_.next_batch(clock_ms(), hopeless);
  for (Request* request : hopeless) {
    waiter_of(*request).settle(too_late(*request, clock_ms()));
  }
  if (batch) {
    busy_ = true;
    serve(*batch, lock);
    busy_ = false;
  }
}

/// Run a batch and answer each of its requests once; one that fails takes no other with it.
void AutoQueue::serve(Batch& batch, std::unique_lock<std::mutex>& lock) {
  const Key ratio = scheduler_.costs().ratios()[static_cast<std::size_t>(batch.level)];
  lock.unlock();
  Computed computed;
  std::exception_ptr failed;
  try {
    std::vector<Row> rows;
    for (Request* request : batch.requests) {
      const std::vector<Row>& own = waiter_of(*request).rows_given;
      rows.insert(rows.end(), own.begin(), own.end());
    }
    computed = compute_(ratio, rows);
  } catch (...) {  // whatever an engine raises is the answer of this batch's requests
    failed = std::current_exception();
  }
  const double now = clock_ms();
  lock.lock();
  scheduler_.done(now, failed ? nullptr : &batch, computed.compute_ms);
  std::size_t first = 0;
  for (Request* request : batch.requests) {
    Waiter& waiter = waiter_of(*request);
    std::exception_ptr own = failed;
    try {
      if (!own) {
        waiter.result.outputs = part_of(computed.outputs, first, waiter.result.lengths, ratio);
        waiter.result.ratio = ratio;
        waiter.result.compute_ms = computed.compute_ms;
        waiter.result.queue_ms = std::max(0.0, now - computed.compute_ms - waiter.arrival);
      }
    } catch (...) {
      own = std::current_exception();
    }
    first += waiter.rows_given.size();
    waiter.settle(own);
  }
}

/// Wake whoever is served next, if nobody leads.
void AutoQueue::hand_on() {
  Request* next = busy_ ? nullptr : scheduler_.first();
  if (next != nullptr) {
    waiter_of(*next).wake.notify_one();
  }
}

}  // namespace variator
