#include "graph.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "files.hpp"
#include "variator/errors.hpp"

namespace variator {

namespace {

/// A file that is no protobuf.
class WireError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The kind of field that holds a text or a message.
constexpr std::uint64_t kBytes = 2;

/// One field of a message: its number and kind, and its bytes or its number's value.
struct WireField {
  std::uint64_t number = 0;
  std::uint64_t kind = 0;
  std::uint64_t value = 0;
  std::string_view bytes;
};

/// Walks over the fields of a message.
class Message {
 public:
  explicit Message(std::string_view bytes) : rest_(bytes) {}

  bool next(WireField& field) {
    if (rest_.empty()) {
      return false;
    }
    const std::uint64_t tag = varint();
    field = {tag >> 3U, tag & 7U, 0, {}};
    switch (field.kind) {
      case 0:
        field.value = varint();
        break;
      case 1:
        field.bytes = taken(8);
        break;
      case kBytes:
        field.bytes = taken(varint());
        break;
      case 5:
        field.bytes = taken(4);
        break;
      default:
        throw WireError("a field of unknown kind");
    }
    return true;
  }

  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(taken(1)[0]);
      value |= static_cast<std::uint64_t>(byte & 127U) << shift;
      if (byte < 128) {
        return value;
      }
    }
    throw WireError("a number without an end");
  }

  bool empty() const { return rest_.empty(); }

 private:
  std::string_view taken(std::uint64_t count) {
    if (count > rest_.size()) {
      throw WireError("it ends too early");
    }
    const std::string_view bytes = rest_.substr(0, static_cast<std::size_t>(count));
    rest_.remove_prefix(static_cast<std::size_t>(count));
    return bytes;
  }

  std::string_view rest_;
};

// Numbers of fields in onnx.proto.
constexpr std::uint64_t kModelGraph = 7;
constexpr std::uint64_t kGraphNode = 1;
constexpr std::uint64_t kGraphInitializer = 5;
constexpr std::uint64_t kNodeInput = 1;
constexpr std::uint64_t kNodeType = 4;
constexpr std::uint64_t kTensorDims = 1;
constexpr std::uint64_t kTensorName = 8;
constexpr std::uint64_t kTensorExternal = 13;
constexpr std::uint64_t kTensorPlace = 14;
constexpr std::uint64_t kEntryKey = 1;
constexpr std::uint64_t kEntryValue = 2;

struct TensorInfo {
  std::string name;
  double elements = 1.0;
  bool external = false;
  std::map<std::string, std::string> entries;
};

struct NodeInfo {
  std::string type;
  std::vector<std::string> inputs;
};

struct GraphInfo {
  std::vector<TensorInfo> tensors;
  std::vector<NodeInfo> nodes;
};

/// A field's text: ONNX Runtime skips a field of another kind, and would go by what we no longer see.
std::string_view text_in(const WireField& field) {
  if (field.kind != kBytes) {
    throw WireError("field " + std::to_string(field.number) + " is no text");
  }
  return field.bytes;
}

std::pair<std::string, std::string> entry_in(std::string_view bytes) {
  std::pair<std::string, std::string> entry;
  Message message(bytes);
  for (WireField one; message.next(one);) {
    if (one.number == kEntryKey) {
      entry.first = text_in(one);
    } else if (one.number == kEntryValue) {
      entry.second = text_in(one);
    }
  }
  return entry;
}

TensorInfo tensor_in(std::string_view bytes) {
  TensorInfo tensor;
  Message message(bytes);
  for (WireField one; message.next(one);) {
    if (one.number == kTensorName) {
      tensor.name = text_in(one);
    } else if (one.number == kTensorPlace) {
      tensor.external = one.value == 1;
    } else if (one.number == kTensorExternal) {
      const auto [entry, fresh] = tensor.entries.insert(entry_in(text_in(one)));
      if (!fresh) {
        throw WireError("a tensor has " + entry->first + " twice");
      }
    } else if (one.number == kTensorDims && one.bytes.empty()) {
      tensor.elements *= static_cast<double>(one.value);
    } else if (one.number == kTensorDims) {  // packed
      for (Message sizes(one.bytes); !sizes.empty();) {
        tensor.elements *= static_cast<double>(sizes.varint());
      }
    }
  }
  return tensor;
}

NodeInfo node_in(std::string_view bytes) {
  NodeInfo node;
  Message message(bytes);
  for (WireField one; message.next(one);) {
    if (one.number == kNodeType) {
      node.type = text_in(one);
    } else if (one.number == kNodeInput) {
      node.inputs.emplace_back(text_in(one));
    }
  }
  return node;
}

GraphInfo graph_in(std::string_view model) {
  GraphInfo graph;
  Message outer(model);
  for (WireField part; outer.next(part);) {
    if (part.number != kModelGraph) {
      continue;
    }
    Message inner(text_in(part));
    for (WireField one; inner.next(one);) {
      if (one.number == kGraphNode) {
        graph.nodes.push_back(node_in(text_in(one)));
      } else if (one.number == kGraphInitializer) {
        graph.tensors.push_back(tensor_in(text_in(one)));
      }
    }
  }
  if (graph.nodes.empty()) {
    throw WireError("it holds no node");
  }
  return graph;
}

/// A number among a tensor's entries; 0 if it is not there.
std::uint64_t number_at(const TensorInfo& tensor, const std::string& name) {
  const auto found = tensor.entries.find(name);
  if (found == tensor.entries.end()) {
    return 0;
  }
  const std::string& text = found->second;
  std::uint64_t number = 0;
  const auto [end, trouble] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (trouble != std::errc() || end != text.data() + text.size() || number > (std::uint64_t{1} << 62U)) {
    throw WireError("'" + tensor.name + "' has " + name + " '" + text + "'");
  }
  return number;
}

void check_place(const std::filesystem::path& graph, const TensorInfo& tensor) {
  const auto location = tensor.entries.find("location");
  const auto file = inside(graph.parent_path(), location == tensor.entries.end() ? "" : location->second);
  const std::uint64_t end = number_at(tensor, "offset") + number_at(tensor, "length");
  std::error_code trouble;
  const std::uintmax_t size = std::filesystem::file_size(file, trouble);
  if (trouble || size < end) {
    throw BundleError(graph.filename().string() + ": the data of '" + tensor.name + "' is missing from " +
                          file.filename().string(),
                      "", kCopyAgain);
  }
}

bool among(const std::string& type, std::initializer_list<const char*> types) {
  return std::any_of(types.begin(), types.end(), [&type](const char* one) { return type == one; });
}

const char* precision_of(const GraphInfo& graph) {
  std::map<std::string, double> sizes;
  for (const TensorInfo& tensor : graph.tensors) {
    sizes[tensor.name] = tensor.elements;
  }
  double int8 = 0.0;
  double fp32 = 0.0;
  for (const NodeInfo& node : graph.nodes) {
    double largest = 0.0;
    for (const std::string& name : node.inputs) {
      const auto found = sizes.find(name);
      largest = std::max(largest, found == sizes.end() ? 0.0 : found->second);
    }
    if (among(node.type, {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"})) {
      int8 += largest;
    } else if (among(node.type, {"MatMul", "Gemm", "FusedMatMul", "FusedGemm"})) {
      fp32 += largest;
    }
  }
  return int8 >= fp32 ? "int8" : "fp32";
}

}  // namespace

std::string checked_precision(const std::filesystem::path& graph) {
  std::string bytes;
  if (!read_whole(graph, bytes)) {
    throw BundleError(graph.string() + " cannot be read", "", kCopyAgain);
  }
  try {
    const GraphInfo info = graph_in(bytes);
    for (const TensorInfo& tensor : info.tensors) {
      if (tensor.external || !tensor.entries.empty()) {
        check_place(graph, tensor);
      }
    }
    return precision_of(info);
  } catch (const WireError& error) {
    throw BundleError(graph.string() + " is not an ONNX graph: " + error.what(), "", kCopyAgain);
  }
}

}  // namespace variator
