/// What the tests drive: one command, its arguments as a JSON file, its answer as JSON on stdout.
///
///   infer      requests, one after another, each with outputs or the kind of its error
///   threads    the same requests by many threads at once: all answers
///   policies   states of a queue: the decision of each
///   schedule   what happens to a queue: batches, refusals, pace
///   auto       calls that share a queue over an engine that is made up: each one's answer
///   place      a run's outputs of given shapes, placed into a request's
///   loads      graphs asked for while the first is being loaded
///   verify     named files of a bundle
///   hash       sha256 of a text

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <future>
#include <iostream>
#include <iterator>
#include <limits>
#include <list>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "auto_queue.hpp"
#include "json.hpp"
#include "loaded.hpp"
#include "rows.hpp"
#include "scheduler.hpp"
#include "sha256.hpp"
#include "variator/variator.hpp"

namespace {

using variator::Json;

/// Splits texts into letters: enough to see that texts go the way of token ids.
class Letters final : public variator::Tokenizer {
 public:
  variator::Row encode(const std::string& text) const override {
    variator::Row row;
    for (const char letter : text) {
      row.ids.push_back(letter - 'a');
    }
    return row;
  }
};

/// The words of a bundle's tokenizer between the marks that it puts around them; truncates as that tokenizer does.
class Words final : public variator::Tokenizer {
 public:
  explicit Words(const std::string& bundle) {
    std::ifstream file(bundle + "/tokenizer.json");
    vocabulary_ = Json::parse(file)["model"]["vocab"];
  }

  variator::Row encode(const std::string& text) const override {
    return truncated(text, std::numeric_limits<std::int64_t>::max());
  }

  variator::Row truncated(const std::string& text, std::int64_t limit) const override {
    variator::Row row{{vocabulary_["[CLS]"]}, {}};
    std::istringstream words(text);
    for (std::string word; static_cast<std::int64_t>(row.ids.size()) < limit - 1 && words >> word;) {
      row.ids.push_back(vocabulary_[word]);
    }
    row.ids.push_back(vocabulary_["[SEP]"]);
    return row;
  }

 private:
  Json vocabulary_;
};

std::string kind_of(const std::exception& error) {
  if (dynamic_cast<const variator::InputError*>(&error) != nullptr) {
    return "InputError";
  }
  if (dynamic_cast<const variator::BundleError*>(&error) != nullptr) {
    return "BundleError";
  }
  if (dynamic_cast<const variator::EngineError*>(&error) != nullptr) {
    return "EngineError";
  }
  if (dynamic_cast<const variator::DeadlineExceeded*>(&error) != nullptr) {
    return "DeadlineExceeded";
  }
  return dynamic_cast<const variator::Overloaded*>(&error) != nullptr ? "Overloaded" : "other";
}

Json told(const std::exception& error) { return {{"error", kind_of(error)}, {"what", error.what()}}; }

variator::Key key_of(const Json& value) {
  return value.is_string() ? variator::Key(value.get<std::string>()) : variator::Key(value.get<int>());
}

Json answer_of(const variator::Result& result) {
  Json outputs = Json::object();
  for (const auto& [name, tensor] : result.outputs) {
    outputs[name] = {{"shape", tensor.shape}, {"values", tensor.values}};
  }
  return {{"outputs", outputs},           {"lengths", result.lengths},       {"ratio", result.ratio.text()},
          {"engine", result.engine},      {"precision", result.precision},   {"load_ms", result.load_ms},
          {"queue_ms", result.queue_ms},  {"compute_ms", result.compute_ms}, {"expected_quality", result.expected_quality}};
}

Json answered(variator::Runtime& runtime, const Json& request) {
  try {
    variator::InferOptions options;
    options.truncate = request.value("truncate", false);
    if (request.contains("slo_ms")) {
      options.slo_ms = request["slo_ms"].get<double>();
    }
    const variator::Key ratio = key_of(request["ratio"]);
    if (request.contains("texts")) {
      return answer_of(runtime.infer_texts(request["texts"].get<std::vector<std::string>>(), ratio, options));
    }
    std::vector<variator::Row> rows;
    for (const Json& ids : request["rows"]) {
      rows.push_back({ids.get<std::vector<std::int64_t>>(), {}});
    }
    for (std::size_t row = 0; request.contains("types") && row < rows.size(); ++row) {
      rows[row].types = request["types"][row].get<std::vector<std::int64_t>>();
    }
    return answer_of(runtime.infer(rows, ratio, options));
  } catch (const std::exception& error) {
    return told(error);
  }
}

variator::Runtime opened(const Json& given) {
  variator::OpenOptions options;
  options.engine = given.value("engine", options.engine);
  options.precision = given.value("precision", options.precision);
  options.threads = given.value("threads", options.threads);
  options.verify = given.value("verify", options.verify);
  options.policy = given.value("policy", options.policy);
  options.slo_ms = given.value("slo_ms", options.slo_ms);
  options.max_queue = given.value("max_queue", options.max_queue);
  const std::string tokenizer = given.value("tokenizer", "");
  if (tokenizer == "letters") {
    options.tokenizer = std::make_shared<Letters>();
  } else if (tokenizer == "words") {
    options.tokenizer = std::make_shared<Words>(given["bundle"].get<std::string>());
  }
  return variator::Runtime(given["bundle"].get<std::string>(), options);
}

Json infer(const Json& given) {
  variator::Runtime runtime = opened(given);
  Json answers = Json::array();
  for (const Json& request : given["requests"]) {
    answers.push_back(answered(runtime, request));
  }
  return {{"picked", runtime.picked()}, {"answers", answers}};
}

/// Every thread sends all requests, beginning with another one each.
Json threads(const Json& given) {
  variator::Runtime runtime = opened(given);
  const Json& requests = given["requests"];
  const auto count = given["count"].get<std::size_t>();
  std::vector<Json> found(count, Json::array());
  std::vector<std::thread> running;
  for (std::size_t thread = 0; thread < count; ++thread) {
    running.emplace_back([&, thread] {
      for (std::size_t i = 0; i < requests.size(); ++i) {
        const std::size_t index = (i + thread) % requests.size();
        Json answer = answered(runtime, requests[index]);
        answer["request"] = index;
        found[thread].push_back(std::move(answer));
      }
    });
  }
  for (std::thread& thread : running) {
    thread.join();
  }
  return found;
}

variator::Policy policy_of(const Json& given) {
  using variator::Costs;
  using variator::Queue;
  const auto name = given["name"].get<std::string>();
  if (name == "fixed") {
    const int level = given["level"];
    return [level](const Queue& queue, const Costs& costs, double now) { return fixed(queue, costs, now, level); };
  }
  if (name == "thresholds") {
    const auto shares = given["shares"].get<std::vector<double>>();
    return [shares](const Queue& queue, const Costs& costs, double now) { return thresholds(queue, costs, now, shares); };
  }
  if (name == "slackfit") {
    const int bins = given["bins"];
    return [bins](const Queue& queue, const Costs& costs, double now) { return slackfit(queue, costs, now, bins); };
  }
  const double alpha = given["alpha"];
  const double margin = given["margin"];
  return [alpha, margin](const Queue& queue, const Costs& costs, double now) {
    return drain(queue, costs, now, alpha, margin);
  };
}

variator::Costs costs_of(const Json& given) {
  const variator::LatencyTable table = variator::LatencyTable::from_json(given["table"].dump());
  std::vector<variator::Key> ratios;
  for (const Json& ratio : given["ratios"]) {
    ratios.push_back(key_of(ratio));
  }
  return {table, ratios, given["buckets"].get<std::vector<int>>(), given["max_rows"].get<int>()};
}

Json policies(const Json& given) {
  std::vector<variator::Costs> costs;
  for (const Json& one : given["costs"]) {
    costs.push_back(costs_of(one));
  }
  Json decisions = Json::array();
  for (const Json& state : given["states"]) {
    const Json& head = state["head"];
    const variator::Queue queue{{head["arrival"], head["deadline"], head["bucket"], head["rows"]},
                                state["waiting"],
                                state["drain_ms"].get<std::vector<double>>(),
                                state["pace"]};
    const auto decided = policy_of(state["policy"])(queue, costs[state["costs"].get<std::size_t>()], state["now"]);
    decisions.push_back({decided.level, decided.rows});
  }
  return decisions;
}

Json schedule(const Json& given) {
  variator::Scheduler scheduler(costs_of(given), policy_of(given["policy"]), given["slo_ms"], given["max_queue"]);
  std::list<variator::Request> requests;
  std::optional<variator::Batch> running;
  Json happened = Json::array();
  const auto numbers = [&](const std::vector<variator::Request*>& some) {
    std::vector<std::ptrdiff_t> found;
    for (const variator::Request* one : some) {
      found.push_back(std::distance(requests.begin(), std::find_if(requests.begin(), requests.end(), [one](const auto& request) {
                                      return &request == one;
                                    })));
    }
    return found;
  };
  for (const Json& event : given["events"]) {
    const double now = event["now"];
    try {
      if (event["what"] == "submit") {
        variator::Request& request = requests.emplace_back();
        request.rows = event["rows"];
        request.length = event["length"];
        request.arrival = event["arrival"];
        request.deadline = event["deadline"];
        scheduler.submit(request, now);
        happened.push_back("waits");
      } else if (event["what"] == "next") {
        std::vector<variator::Request*> hopeless;
        running = scheduler.next_batch(now, hopeless);
        Json batch = running ? Json{{"requests", numbers(running->requests)}, {"level", running->level}, {"rows", running->rows},
                                    {"expected_ms", running->expected_ms}}
                             : Json();
        happened.push_back({{"batch", batch}, {"hopeless", numbers(hopeless)}});
      } else {
        scheduler.done(now, running ? &*running : nullptr, event["took_ms"]);
        happened.push_back("done");
      }
    } catch (const variator::Error& error) {
      happened.push_back(kind_of(error));
    }
  }
  return happened;
}

/// Wait for something that other threads do.
template <typename Condition>
void until(const Condition& condition) {
  while (!condition()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

/// A call each, in a thread each: the first one's batch ends when all others wait or have been answered, those that
/// `expire` in any case. An answer holds its rows' ids and the number of their batch; a batch with an id among `throws`
/// fails, a row with one among `nan` gets no number.
Json share(const Json& given) {
  const auto among = [&given](const char* list, std::int64_t id) {
    return std::find(given[list].begin(), given[list].end(), id) != given[list].end();
  };
  std::atomic<int> batches{0};
  std::promise<void> release;
  const std::shared_future<void> released = release.get_future().share();
  variator::Scheduler scheduler(costs_of(given), policy_of(given["policy"]), given["slo_ms"], given["max_queue"]);
  variator::AutoQueue queue(std::move(scheduler), [&](const variator::Key&, const std::vector<variator::Row>& rows) {
    const auto number = static_cast<float>(batches++);
    released.wait();
    variator::Tensor ours{{static_cast<std::int64_t>(rows.size()), 2}, {}};
    for (const variator::Row& row : rows) {
      if (among("throws", row.ids[0])) {
        throw variator::EngineError("made up");
      }
      ours.values.push_back(static_cast<float>(row.ids[0]));
      ours.values.push_back(among("nan", row.ids[0]) ? std::numeric_limits<float>::quiet_NaN() : number);
    }
    return variator::Computed{{{"made", ours}}, 1.0};
  });
  const Json& calls = given["calls"];
  std::vector<Json> answers(calls.size());
  std::vector<std::thread> running;
  std::atomic<std::size_t> answered{0};
  for (std::size_t index = 0; index < calls.size(); ++index) {
    running.emplace_back([&, index] {
      const Json& call = calls[index];
      std::vector<variator::Row> rows;
      for (const Json& id : call["ids"]) {
        rows.push_back({std::vector<std::int64_t>(call["length"].get<std::size_t>(), id), {}});
      }
      try {
        answers[index] = answer_of(queue.infer(rows, call["slo_ms"]));
      } catch (const std::exception& error) {
        answers[index] = told(error);
      }
      ++answered;
    });
    until([&] { return batches == 1 && queue.waiting() + answered == index; });
  }
  until([&] { return answered >= given["expire"].get<std::size_t>(); });
  release.set_value();
  for (std::thread& thread : running) {
    thread.join();
  }
  return answers;
}

/// Parts of one request: the shape of its outputs, or the kind of the error.
Json placed(const Json& given) {
  variator::Outputs outputs;
  try {
    for (const Json& part : given["parts"]) {
      const auto shape = part["shape"].get<std::vector<std::int64_t>>();
      std::int64_t size = 1;
      for (const std::int64_t one : shape) {
        size *= one;
      }
      const std::vector<float> values(static_cast<std::size_t>(size), 1.0F);
      variator::place(outputs, given["name"], shape, values.data(), part["places"].get<std::vector<std::size_t>>(),
                      given["lengths"].get<std::vector<std::int64_t>>());
    }
    return outputs[given["name"]].shape;
  } catch (const std::exception& error) {
    return told(error);
  }
}

/// An engine that does nothing.
class Idle final : public variator::Engine {
 public:
  void run(const variator::Feed& /*feed*/, const variator::Sink& /*sink*/) override {}
  std::string precision() const override { return "none"; }
};

/// Two graphs: the second is loaded and used while the first's load goes on; two threads ask for that one, one load fails.
Json loads() {
  std::atomic<int> begun{0};
  std::promise<void> release;
  const std::shared_future<void> released = release.get_future().share();
  variator::Loaded loaded({"slow", "fast"}, [&](const std::string& graph) -> std::unique_ptr<variator::Engine> {
    if (graph == "slow") {
      ++begun;
      released.wait();
      if (begun == 1) {
        throw variator::EngineError("made up");
      }
    }
    return std::make_unique<Idle>();
  });
  std::atomic<int> failed{0};
  std::vector<std::thread> waiting;
  for (int thread = 0; thread < 2; ++thread) {
    waiting.emplace_back([&] {
      try {
        loaded.at("slow");
      } catch (const variator::EngineError&) {
        ++failed;
      }
    });
  }
  until([&] { return begun == 1; });
  const bool same = &loaded.at("fast") == &loaded.at("fast");  // does not come back if it waits for the other
  release.set_value();
  for (std::thread& thread : waiting) {
    thread.join();
  }
  return {{"same", same}, {"begun", begun.load()}, {"failed", failed.load()}};
}

Json run(const std::string& command, const Json& given) {
  if (command == "infer") {
    return infer(given);
  }
  if (command == "threads") {
    return threads(given);
  }
  if (command == "policies") {
    return policies(given);
  }
  if (command == "schedule") {
    return schedule(given);
  }
  if (command == "auto") {
    return share(given);
  }
  if (command == "place") {
    return placed(given);
  }
  if (command == "loads") {
    return loads();
  }
  if (command == "verify") {
    variator::Bundle::open(given["bundle"].get<std::string>()).verify(given["names"].get<std::vector<std::string>>());
    return "verified";
  }
  if (command == "hash") {
    return variator::sha256_of(given["text"].get<std::string>());
  }
  throw variator::InputError("no command '" + command + "'", "infer, threads, policies, schedule, auto, place, loads, verify, hash");
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 3) {
      throw variator::InputError("too few arguments", "COMMAND FILE");
    }
    std::ifstream file(arguments[2]);
    std::cout << run(arguments[1], Json::parse(file)).dump() << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::cout << told(error).dump() << "\n";
    return 1;
  }
}
