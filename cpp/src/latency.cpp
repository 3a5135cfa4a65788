#include "variator/latency.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "json.hpp"

namespace variator {

namespace {

const char* const kSchema = "variator.latency/1";
const char* const kCalibrate = "variator bench BUNDLE --calibrate";

using Shape = std::pair<int, int>;

Shape shape_of(const Point& point) { return {point.batch, point.length}; }

void check(const Point& point) {
  if (!std::isfinite(point.p50_ms) || point.p50_ms <= 0 || point.batch < 1 || point.length < 1) {
    throw EngineError("the latency table holds " + std::to_string(point.p50_ms) + " ms for " +
                          std::to_string(point.batch) + " x " + std::to_string(point.length),
                      "positive times and sizes", kCalibrate);
  }
}

/// The largest shape that all ratios have.
Shape largest_common(const std::vector<Point>& points, const std::vector<Key>& ratios) {
  std::map<Shape, std::set<Key>> measured;
  for (const Point& point : points) {
    measured[shape_of(point)].insert(point.ratio);
  }
  Shape largest = {0, 0};
  const auto tokens = [](const Shape& shape) { return std::int64_t{shape.first} * shape.second; };
  for (const auto& [shape, of] : measured) {  // ascending: of shapes with as many tokens the last
    if (of.size() == ratios.size() && tokens(shape) >= tokens(largest)) {
      largest = shape;
    }
  }
  if (largest.first == 0) {
    throw EngineError("the ratios of the latency table have no shape in common", "the same for all", kCalibrate);
  }
  return largest;
}

std::vector<Key> slowest_first(const std::vector<Point>& points) {
  std::vector<Key> ratios;
  for (const Point& point : points) {
    check(point);
    if (std::find(ratios.begin(), ratios.end(), point.ratio) == ratios.end()) {
      ratios.push_back(point.ratio);
    }
  }
  if (std::find(ratios.begin(), ratios.end(), Key(1)) == ratios.end()) {
    throw EngineError("the latency table has no ratio 1", "", kCalibrate);
  }
  const Shape largest = largest_common(points, ratios);
  std::map<Key, double> at;
  for (const Point& point : points) {
    if (shape_of(point) == largest) {
      at[point.ratio] = point.p50_ms;
    }
  }
  std::stable_sort(ratios.begin(), ratios.end(), [&at](const Key& one, const Key& other) {
    const bool first = one != Key(1);
    const bool second = other != Key(1);
    return first != second ? second : at[one] > at[other];
  });
  return ratios;
}

/// Linear between places; before the first its value, after the last in proportion. In numpy's order of operations.
double between(double at, const std::vector<int>& places, const std::vector<double>& values) {
  if (at > places.back()) {
    return values.back() * at / places.back();
  }
  if (at < places.front()) {
    return values.front();
  }
  const auto next = static_cast<std::size_t>(std::upper_bound(places.begin(), places.end(), at) - places.begin());
  const std::size_t here = next - 1;
  if (next == places.size() || places[here] == at) {
    return values[here];
  }
  const double slope = (values[next] - values[here]) / (places[next] - places[here]);
  return slope * (at - places[here]) + values[here];
}

std::size_t place_of(const std::vector<int>& sorted, int value) {
  return static_cast<std::size_t>(std::lower_bound(sorted.begin(), sorted.end(), value) - sorted.begin());
}

using Matrix = std::vector<std::vector<double>>;

/// The largest of all values at shapes that are not larger.
Matrix largest_below(Matrix values) {
  for (std::size_t row = 0; row < values.size(); ++row) {
    for (std::size_t column = 0; column < values[row].size(); ++column) {
      double& one = values[row][column];
      one = row > 0 ? std::max(one, values[row - 1][column]) : one;
      one = column > 0 ? std::max(one, values[row][column - 1]) : one;
    }
  }
  return values;
}

/// The smallest of all values at shapes that are not smaller.
Matrix smallest_above(Matrix values) {
  for (std::size_t row = values.size(); row-- > 0;) {
    for (std::size_t column = values[row].size(); column-- > 0;) {
      double& one = values[row][column];
      one = row + 1 < values.size() ? std::min(one, values[row + 1][column]) : one;
      one = column + 1 < values[row].size() ? std::min(one, values[row][column + 1]) : one;
    }
  }
  return values;
}

/// Where runs became too long to measure: in proportion to the rows.
void fill(Matrix& values, const std::vector<int>& batches, const std::vector<int>& lengths) {
  for (std::size_t row = 0; row < values.size(); ++row) {
    for (std::size_t column = 0; column < values[row].size(); ++column) {
      if (!std::isnan(values[row][column])) {
        continue;
      }
      if (row == 0) {
        throw EngineError("the latency table misses " + std::to_string(batches[row]) + " x " + std::to_string(lengths[column]),
                          "all lengths for the smallest number of rows", kCalibrate);
      }
      values[row][column] = values[row - 1][column] * batches[row] / batches[row - 1];
    }
  }
}

}  // namespace

LatencyTable::LatencyTable(std::vector<Point> points) {
  if (points.empty()) {
    throw EngineError("the latency table holds no point", "", kCalibrate);
  }
  ratios_ = slowest_first(points);
  for (const Key& ratio : ratios_) {
    std::vector<Point> own;
    std::copy_if(points.begin(), points.end(), std::back_inserter(own),
                 [&ratio](const Point& point) { return point.ratio == ratio; });
    grids_.emplace(ratio, grid_of(own));
  }
}

LatencyTable LatencyTable::from_json(const std::string& text) {
  try {
    const Json data = object_in(text);
    if (text_of(data, "schema") != kSchema) {
      throw EngineError("a latency table of another schema", kSchema);
    }
    std::vector<Point> points;
    for (const Json& one : field(data, "points")) {
      const Json& ratio = field(one, "ratio");
      const auto batch = whole_of(one, "batch");
      const auto length = whole_of(one, "length");
      if (std::max(batch, length) > std::numeric_limits<int>::max() || !(ratio.is_string() || ratio.is_number_integer())) {
        throw FieldError("a point is " + one.dump());
      }
      const Key key = ratio.is_string() ? Key(ratio.get<std::string>()) : Key(ratio.dump());
      points.push_back({key, static_cast<int>(batch), static_cast<int>(length), real_of(one, "p50_ms")});
    }
    LatencyTable table(std::move(points));
    table.key_ = text_of(data, "key");
    table.machine_ = words_of(data, "machine");
    return table;
  } catch (const FieldError& error) {
    throw EngineError(std::string("not a latency table: ") + error.what(), "", kCalibrate);
  } catch (const Json::exception& error) {
    throw EngineError(std::string("not a latency table: ") + error.what(), "", kCalibrate);
  }
}

LatencyTable::Grid LatencyTable::grid_of(const std::vector<Point>& points) {
  std::set<int> batches;
  std::set<int> lengths;
  for (const Point& point : points) {
    batches.insert(point.batch);
    lengths.insert(point.length);
  }
  Grid grid{{batches.begin(), batches.end()}, {lengths.begin(), lengths.end()}, {}};
  Matrix values(batches.size(), std::vector<double>(lengths.size(), std::nan("")));
  for (const Point& point : points) {
    values[place_of(grid.batches, point.batch)][place_of(grid.lengths, point.length)] = point.p50_ms;
  }
  fill(values, grid.batches, grid.lengths);
  const Matrix below = largest_below(values);
  const Matrix above = smallest_above(values);
  for (std::size_t row = 0; row < values.size(); ++row) {
    for (std::size_t column = 0; column < values[row].size(); ++column) {
      values[row][column] = (below[row][column] + above[row][column]) / 2;
    }
  }
  grid.values = std::move(values);
  return grid;
}

std::vector<double> LatencyTable::line(const Key& ratio, int length) const {
  const auto found = grids_.find(ratio);
  if (found == grids_.end()) {
    throw InputError("the latency of ratio " + ratio.text() + " was not measured", in_words(ratios_));
  }
  const Grid& grid = found->second;
  std::vector<double> column;
  column.reserve(grid.values.size());
  for (const std::vector<double>& row : grid.values) {
    column.push_back(between(length, grid.lengths, row));
  }
  std::vector<double> times = {0.0};
  for (int rows = 1; rows <= kMaxRows; ++rows) {
    times.push_back(between(rows, grid.batches, column));
  }
  return times;
}

double of_rows(const std::vector<double>& line, int rows) {
  return rows <= kMaxRows ? line[static_cast<std::size_t>(rows)] : line[kMaxRows] / kMaxRows * rows;
}

}  // namespace variator
