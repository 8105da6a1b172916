// Exercises the native history for the sanitizers: drafts against a search through the text, then
// readers beside a writer that learns and forgets under a tight cap. Exit status 1 if a draft is
// wrong. `fuzz SEED ROUNDS`.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "history.h"
#include "reader.h"

using namespace paceline;
using Text = std::vector<Token>;

constexpr std::uint32_t kMaxMatch = 6;
constexpr int kDraft = 5;

void fail(const char* what) {
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

struct Answer {
  Text tokens;
  std::int32_t match;
};

Answer ask(Reader& reader, std::int64_t request, const Text& grown) {
  Answer answer{Text(kDraft), 0};
  float probabilities[kDraft];
  std::int32_t num_tokens = 0;
  std::int64_t generation = 0;
  const auto num_grown = static_cast<std::int32_t>(grown.size());
  const std::int32_t max_draft = kDraft;
  reader.propose({&request, 1, {grown.data(), grown.size()}, &num_grown, &max_draft}, 0.0,
                 {kDraft, answer.tokens.data(), probabilities, &num_tokens, &answer.match,
                  &generation});
  answer.tokens.resize(static_cast<std::size_t>(num_tokens));
  return answer;
}

bool occurs(const std::vector<Text>& texts, const Text& wanted) {
  return std::any_of(texts.begin(), texts.end(), [&](const Text& text) {
    return std::search(text.begin(), text.end(), wanted.begin(), wanted.end()) != text.end();
  });
}

Text text_of(std::mt19937& random, std::size_t max_size, int num_tokens) {
  Text text(random() % (max_size + 1));
  for (Token& token : text) token = static_cast<Token>(random() % num_tokens);
  return text;
}

void compare_with_search(std::mt19937& random) {
  auto history = std::make_shared<History>(3, 1 << 24);
  Reader reader(history, {1, kMaxMatch, 0.5});
  std::optional<std::int64_t> seed;
  if (random() % 2 == 0) seed = random();
  const std::int64_t request = reader.open("p", seed, 0);
  Text context;
  for (int event = 0; event < 30; ++event) {
    const std::int64_t generation = random() % 6;
    const std::string sequence(1, static_cast<char>('a' + random() % 2));
    switch (random() % 6) {
      case 0: history->add("p", generation, {}); break;
      case 1: history->end_sequence("p", generation, sequence); break;
      case 2: if (random() % 8 == 0) history->forget(generation); break;
      default:
        const Text text = text_of(random, 60, 1 + random() % 40);
        history->extend("p", generation, sequence, {text.data(), text.size()});
    }
    const Text grown = text_of(random, 3, 4);
    context.insert(context.end(), grown.begin(), grown.end());
    const Answer answer = ask(reader, request, grown);
    std::vector<Text> texts;
    for (const auto& each : history->summaries()) {
      for (const Text& text : history->sequences("p", each.generation)) texts.push_back(text);
    }
    const auto match = context.end() - answer.match;
    Text followed(match, context.end());
    followed.insert(followed.end(), answer.tokens.begin(), answer.tokens.end());
    if (answer.match > 0 && !occurs(texts, followed)) fail("a draft that never occurred");
    if (answer.tokens.empty() != (answer.match == 0)) fail("a match without a draft");
    const auto longer = static_cast<std::size_t>(answer.match) + 1;
    for (std::size_t size = longer; size <= std::min<std::size_t>(context.size(), kMaxMatch);
         ++size) {
      for (Token next = 0; next < 40; ++next) {
        Text suffix(context.end() - static_cast<std::ptrdiff_t>(size), context.end());
        suffix.push_back(next);
        if (occurs(texts, suffix)) fail("a longer match was there");
      }
    }
  }
}

// Problem i says i, i + 4, i + 8, ... for ever: every right draft goes on so.
void read_beside_a_writer(std::mt19937& random, int rounds) {
  auto history = std::make_shared<History>(2, 250'000);
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  for (int thread = 0; thread < 3; ++thread) {
    readers.emplace_back([&history, &done] {
      Reader reader(history, {1, kMaxMatch, 0.5});
      for (Token problem = 0; !done; problem = (problem + 1) % 4) {
        const std::int64_t fan = reader.open(std::to_string(problem), problem, 0);
        for (const Token token : ask(reader, fan, {-100}).tokens) {
          if (token > -1000) fail("a draft that never followed");
        }
        reader.close(fan);
        const std::int64_t request = reader.open(std::to_string(problem), std::nullopt, 0);
        for (Token step = 0; step < 60; ++step) {
          Token next = problem + 4 * step;
          for (const Token token : ask(reader, request, {next}).tokens) {
            if (token != (next += 4)) fail("a draft that is none of the problem");
          }
        }
        reader.close(request);
      }
    });
  }
  for (int round = 0; round < rounds; ++round) {
    const Token problem = static_cast<Token>(random() % 4);
    const std::string name = std::to_string(problem);
    for (Token from = 0; from < 60;) {
      Text piece(1 + random() % 9);
      for (Token& token : piece) token = problem + 4 * from++;
      history->extend(name, round / 8, "open", {piece.data(), piece.size()});
    }
    // Fan-out makes tables grow and be replaced under the readers.
    for (Token other = 0; other < 40; ++other) {
      const Text text{-1 - other, problem, problem + 4};
      history->add(name, round / 8, {text.data(), text.size()});
      const Text fan{-100, -1000 - static_cast<Token>(random() % 5000)};
      history->add(name, round / 8, {fan.data(), fan.size()});
    }
    history->end_sequence(name, round / 8, "open");
    if (history->memory_bytes() > 250'000) fail("more memory than the cap");
    if (random() % 50 == 0) history->forget(round / 8);
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  std::mt19937 random(static_cast<std::uint32_t>(std::atoi(arguments[1])));
  const int rounds = std::atoi(arguments[2]);
  for (int round = 0; round < rounds; ++round) compare_with_search(random);
  read_beside_a_writer(random, 10 * rounds);
}
