/// What the tests drive: one command, its arguments as a JSON file, its answer as JSON on stdout.
///
///   infer      requests, one after another, each with outputs or the kind of its error
///   threads    the same requests by many threads at once: all answers
///   policies   states of a queue: the decision of each
///   schedule   what happens to a queue: batches, refusals, pace
///   hash       sha256 of a text

#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <list>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "json.hpp"
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
  if (command == "hash") {
    return variator::sha256_of(given["text"].get<std::string>());
  }
  throw variator::InputError("no command '" + command + "'", "infer, threads, policies, schedule, hash");
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
