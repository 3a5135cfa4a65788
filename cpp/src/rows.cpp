#include "rows.hpp"

#include <algorithm>
#include <limits>
#include <map>

namespace variator {

namespace {

/// Lengths that rows are padded to: few distinct shapes, little padding.
constexpr std::int64_t kBuckets[] = {8,   16,  24,  32,  48,   64,   96,   128,  192,  256,  384,
                                     512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 6144};

/// Largest rows x length of one engine call; longer requests run in parts.
constexpr std::int64_t kTokensPerRun = 16384;

/// Largest rows x length x length of one call, unless it is a single row: attention compares all pairs of tokens.
constexpr std::int64_t kSquaresPerRun = 33554432;

bool per_token(const std::string& name) {
  return name == "last_hidden_state" || name == "start_logits" || name == "end_logits";
}

/// What token outputs hold behind a row's end, so that no answer is found there.
float padding_of(const std::string& name) { return name == "start_logits" || name == "end_logits" ? -3.0e4F : 0.0F; }

std::string input(std::size_t index) { return "input " + std::to_string(index); }

void check_ids(const Row& row, std::size_t index, std::int64_t vocabulary) {
  if (row.ids.empty()) {
    throw InputError(input(index) + " is empty", "at least one token id");
  }
  for (const std::int64_t id : row.ids) {
    if (id < 0 || id >= vocabulary) {
      throw InputError(input(index) + " holds token id " + std::to_string(id), "0 to " + std::to_string(vocabulary - 1));
    }
  }
}

void check_types(const Row& row, std::size_t index) {
  const bool fit = row.types.empty() || row.types.size() == row.ids.size();
  const bool known = std::all_of(row.types.begin(), row.types.end(), [](std::int64_t type) { return type == 0 || type == 1; });
  if (!fit || !known) {
    throw InputError("the token types of " + input(index) + " do not fit", "a 0 or 1 for every token id");
  }
}

/// Whether two shapes are the same behind the first dimensions.
bool same_behind(std::size_t first, const std::vector<std::int64_t>& one, const std::vector<std::int64_t>& other) {
  const auto from = static_cast<std::ptrdiff_t>(first);
  return std::equal(one.begin() + from, one.end(), other.begin() + from, other.end());
}

/// The most rows of a length that one run may have.
std::size_t most_rows(std::int64_t length, const std::vector<ShapeRange>& profiles) {
  std::int64_t held = 0;
  for (const ShapeRange& profile : profiles) {
    if (profile.shortest <= length && length <= profile.longest) {
      held = std::max(held, profile.most_rows);
    }
  }
  const std::int64_t limit = held > 0 ? held : std::numeric_limits<std::int64_t>::max();
  const std::int64_t fitting = std::min(kTokensPerRun / length, kSquaresPerRun / (length * length));
  return static_cast<std::size_t>(std::min(std::max<std::int64_t>(1, fitting), limit));
}

/// Cut places of one length into parts that run at once.
void cut(std::vector<Part>& parts, std::int64_t length, const std::vector<std::size_t>& places,
         const std::vector<ShapeRange>& profiles) {
  const std::size_t most = most_rows(length, profiles);
  for (std::size_t start = 0; start < places.size(); start += most) {
    const auto first = places.begin() + static_cast<std::ptrdiff_t>(start);
    const auto count = static_cast<std::ptrdiff_t>(std::min(most, places.size() - start));
    parts.push_back({length, {first, first + count}});
  }
}

}  // namespace

bool check_rows(const std::vector<Row>& rows, const Manifest& manifest, bool truncate) {
  if (rows.empty()) {
    throw InputError("the request is empty", "at least one list of token ids");
  }
  const auto limit = static_cast<std::size_t>(manifest.max_length);
  bool too_long = false;
  for (std::size_t index = 0; index < rows.size(); ++index) {
    check_ids(rows[index], index, manifest.vocabulary);
    check_types(rows[index], index);
    if (rows[index].ids.size() > limit && !truncate) {
      throw InputError(input(index) + " has " + std::to_string(rows[index].ids.size()) + " tokens",
                       "1 to " + std::to_string(limit) + ", the model's limit", "shorten it, or set truncate");
    }
    too_long = too_long || rows[index].ids.size() > limit;
  }
  return too_long;
}

std::vector<Row> cut_at(std::int64_t limit, const std::vector<Row>& rows) {
  std::vector<Row> cut = rows;
  for (Row& row : cut) {
    row.ids.resize(std::min(row.ids.size(), static_cast<std::size_t>(limit)));
    row.types.resize(row.types.empty() ? 0 : row.ids.size());
  }
  return cut;
}

std::vector<Part> in_buckets(const std::vector<Row>& rows, std::int64_t limit, const std::vector<ShapeRange>& profiles) {
  std::map<std::int64_t, std::vector<std::size_t>> found;
  for (std::size_t index = 0; index < rows.size(); ++index) {
    const auto own = static_cast<std::int64_t>(rows[index].ids.size());
    const auto* bucket = std::lower_bound(std::begin(kBuckets), std::end(kBuckets), own);
    const std::int64_t length = bucket == std::end(kBuckets) ? limit : std::min(*bucket, limit);
    found[length].push_back(index);
  }
  std::vector<Part> parts;
  for (const auto& [length, places] : found) {
    cut(parts, length, places, profiles);
  }
  return parts;
}

std::vector<Part> together(const std::vector<Row>& rows, const std::vector<ShapeRange>& profiles) {
  const std::vector<std::int64_t> lengths = lengths_of(rows);
  std::vector<std::size_t> places(rows.size());
  for (std::size_t index = 0; index < places.size(); ++index) {
    places[index] = index;
  }
  std::vector<Part> parts;
  cut(parts, *std::max_element(lengths.begin(), lengths.end()), places, profiles);
  return parts;
}

void fill(Feed& feed, const std::vector<Row>& rows, const Part& part, const std::vector<std::string>& inputs) {
  feed.rows = static_cast<std::int64_t>(part.places.size());
  feed.length = part.length;
  const auto width = static_cast<std::size_t>(part.length);
  for (const std::string& name : inputs) {
    std::vector<std::int64_t>& values = feed.inputs[name];
    values.assign(part.places.size() * width, 0);
    for (std::size_t index = 0; index < part.places.size(); ++index) {
      const Row& row = rows[part.places[index]];
      const auto start = values.begin() + static_cast<std::ptrdiff_t>(index * width);
      if (name == "attention_mask") {
        std::fill_n(start, row.ids.size(), 1);
      } else if (name == "token_type_ids") {
        std::copy(row.types.begin(), row.types.end(), start);
      } else {
        std::copy(row.ids.begin(), row.ids.end(), start);
      }
    }
  }
}

void place(Outputs& outputs, const std::string& name, const std::vector<std::int64_t>& shape, const float* values,
           const std::vector<std::size_t>& places, const std::vector<std::int64_t>& lengths) {
  const bool tokens = per_token(name);
  const std::size_t fixed_dimensions = tokens ? 2 : 1;
  std::int64_t own_longest = 0;
  for (const std::size_t index : places) {
    own_longest = std::max(own_longest, lengths[index]);
  }
  Tensor& whole = outputs[name];
  const bool fits = shape.size() >= fixed_dimensions && shape[0] == static_cast<std::int64_t>(places.size()) &&
                    (!tokens || shape[1] >= own_longest) &&
                    (whole.shape.empty() || same_behind(fixed_dimensions, shape, whole.shape));
  if (!fits) {
    throw EngineError("the graph's output " + name + " has another shape than its inputs", "", "export again");
  }
  std::size_t width = 1;  // values of a row, or of a token
  for (std::size_t i = fixed_dimensions; i < shape.size(); ++i) {
    width *= static_cast<std::size_t>(shape[i]);
  }
  const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  const std::size_t per_row = tokens ? static_cast<std::size_t>(longest) * width : width;
  if (whole.shape.empty()) {
    whole.shape = shape;
    whole.shape[0] = static_cast<std::int64_t>(lengths.size());
    if (tokens) {
      whole.shape[1] = longest;
    }
    if (!tokens && places.size() == lengths.size()) {  // all rows, in the order that they came in
      whole.values.assign(values, values + places.size() * width);
      return;
    }
    whole.values.assign(lengths.size() * per_row, padding_of(name));
  }
  const std::size_t stride = tokens ? static_cast<std::size_t>(shape[1]) * width : width;
  for (std::size_t row = 0; row < places.size(); ++row) {
    const std::size_t index = places[row];
    const std::size_t count = tokens ? static_cast<std::size_t>(lengths[index]) * width : width;
    std::copy_n(values + row * stride, count, whole.values.data() + index * per_row);
  }
}

std::vector<std::int64_t> lengths_of(const std::vector<Row>& rows) {
  std::vector<std::int64_t> lengths;
  lengths.reserve(rows.size());
  for (const Row& row : rows) {
    lengths.push_back(static_cast<std::int64_t>(row.ids.size()));
  }
  return lengths;
}

}  // namespace variator
