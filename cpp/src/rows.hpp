/// From rows to padded runs and back: Python's `toolkit.rows` and the runtime's length buckets.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "variator/runtime.hpp"

namespace variator {

/// Rows of a request that run together: the length they are padded to, and their places in the request.
struct Part {
  std::int64_t length = 0;
  std::vector<std::size_t> places;
};

/// Check rows as the model takes them; whether any is longer than its limit, which `truncate` allows.
///
/// @throws InputError Naming the row.
bool check_rows(const std::vector<Row>& rows, const Manifest& manifest, bool truncate);

/// Rows cut at a limit.
std::vector<Row> cut_at(std::int64_t limit, const std::vector<Row>& rows);

/// Rows by the length bucket that holds them, shortest first, in parts that run at once.
std::vector<Part> in_buckets(const std::vector<Row>& rows, std::int64_t limit, const std::vector<ShapeRange>& profiles);

/// All rows padded to the longest, in parts that run at once.
std::vector<Part> together(const std::vector<Row>& rows, const std::vector<ShapeRange>& profiles);

/// The inputs of a run, in the memory of the run before.
void fill(Feed& feed, const std::vector<Row>& rows, const Part& part, const std::vector<std::string>& inputs);

/// Copy a run's output into a request's: rows in the order given, token outputs up to each row's length.
///
/// @param lengths Tokens of every row of the request.
/// @throws EngineError If its shape is not that of these rows, or of the parts before.
void place(Outputs& outputs, const std::string& name, const std::vector<std::int64_t>& shape, const float* values,
           const std::vector<std::size_t>& places, const std::vector<std::int64_t>& lengths);

/// Tokens per row.
std::vector<std::int64_t> lengths_of(const std::vector<Row>& rows);

}  // namespace variator
