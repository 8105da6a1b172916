// History of sampled text: a suffix automaton for each problem and generation (weight version).
//
// One writer adds and drops (calls from several threads queue up); `Reader`s draft meanwhile and
// never wait for it. Generations are dropped whole: those beyond the window and, whenever
// memory for the next token would exceed the cap, the oldest of all.

#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "epochs.h"
#include "growing_array.h"
#include "suffix_automaton.h"

namespace paceline {

struct Generation {
  Generation(std::int64_t number, std::uint64_t serial, Epochs& epochs, Budget* budget);

  struct Open {
    SuffixAutomaton::StateIndex end = SuffixAutomaton::kRoot;
    std::vector<Token> tokens;
  };

  const std::int64_t number;
  const std::uint64_t serial;  // in order of creation, never used twice
  Lease lease;                 // for everything but the arrays
  SuffixAutomaton automaton;
  GrowingArray<Token> text;  // ended sequences, each after its length; for saving
  std::uint32_t text_end = GrowingArray<Token>::kFirst;
  std::unordered_map<std::string, Open> open;
};

// Generations of a problem as readers see them: immutable, replaced as a whole.
struct Generations {
  std::uint64_t serial;
  std::vector<const Generation*> newest_first;
};

struct Problem {
  ~Problem() { delete published.load(); }
  std::atomic<const Generations*> published{nullptr};  // nullptr while there is none
  // The writer's:
  std::map<std::int64_t, std::unique_ptr<Generation>> generations;
  std::int64_t first_allowed = INT64_MIN;  // what was dropped does not come back
};

class History final : private Budget {
 public:
  // At most `window` generations a problem, at most `max_bytes` in all.
  History(std::size_t window, std::size_t max_bytes);
  ~History();

  // Adds a whole sequence. Tokens of a generation that was dropped, or would be at once, are
  // refused; a problem of which nothing is left may start anew.
  void add(const std::string& problem, std::int64_t generation, TokenView tokens);

  // Adds the next tokens of an open sequence, or opens it.
  void extend(const std::string& problem, std::int64_t generation, const std::string& sequence,
              TokenView tokens);

  // Ends a sequence; one that is not open is none.
  void end_sequence(const std::string& problem, std::int64_t generation,
                    const std::string& sequence);

  // Drops all generations of all problems before this one, for good.
  void forget(std::int64_t before);

  struct Summary {
    std::string problem;
    std::int64_t generation;
    std::size_t num_tokens;
    std::size_t num_states;
    std::size_t memory_bytes;
  };
  std::vector<Summary> summaries();  // oldest generation first

  // The sequences of a generation, open ones last. Empty if there is no such generation.
  std::vector<std::vector<Token>> sequences(const std::string& problem, std::int64_t generation);

  // Any thread:
  std::size_t memory_bytes() const { return bytes_.load(); }
  std::size_t num_problems();  // known, or asked for by a request
  std::size_t num_tokens() const { return num_tokens_.load(); }
  std::size_t num_refused_tokens() const { return num_offered_tokens_ - num_learned_tokens_; }
  std::size_t num_dropped_generations() const { return num_dropped_generations_.load(); }

 private:
  friend class Reader;
  struct Full {};  // thrown where the generation being written is the one that has to go

  void take(std::size_t bytes) override;
  void give(std::size_t bytes) override { bytes_ -= bytes; }

  template <class Change>
  void write(const std::string& problem, std::int64_t generation, bool make, Change change);
  Generation* find_or_make(Problem& problem, const std::string& name, std::int64_t number);
  void learn(Generation& generation, Generation::Open& open, TokenView tokens);
  void keep_text(Generation& generation, Generation::Open& open);
  void publish(Problem& problem);
  void drop(const std::string& problem, std::int64_t generation);

  std::shared_ptr<Problem> hold(const std::string& name);
  void release(const std::string& name, std::shared_ptr<Problem> problem);

  const std::size_t window_;
  const std::size_t max_bytes_;
  std::atomic<std::size_t> bytes_{0};
  std::atomic<std::size_t> num_tokens_{0};
  std::atomic<std::size_t> num_learned_tokens_{0};
  std::atomic<std::size_t> num_offered_tokens_{0};
  std::atomic<std::size_t> num_dropped_generations_{0};

  Epochs epochs_;
  std::mutex writing_;
  std::uint64_t next_serial_ = 1;
  std::int64_t first_allowed_ = INT64_MIN;
  std::uint64_t being_written_ = 0;  // its serial; 0 is none
  // Number, serial and problem of every generation: the first goes first.
  std::set<std::tuple<std::int64_t, std::uint64_t, std::string>> oldest_first_;

  // Guards the map, and is held for a look-up only: readers take it to open and close a request.
  std::mutex looking_up_;
  std::unordered_map<std::string, std::shared_ptr<Problem>> problems_;
};

}  // namespace paceline
