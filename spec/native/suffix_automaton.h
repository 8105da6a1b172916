// Online suffix automaton over token sequences, with exact continuation counts.
//
// A state stands for a class of strings that end at the same places of the text ("endpos", Blumer
// et al. 1985). Each state keeps how often its strings occurred and which token most often followed
// them, so a draft is read off by one edge per token. Sequences never touch: a sequence starts at
// the root, so no string that crosses two of them is ever in the automaton.

#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <shared_mutex>
#include <vector>

namespace paceline {

using Token = std::int32_t;

// A read-only view of caller-owned tokens.
struct TokenView {
  const Token* data;
  std::size_t size;
  const Token* begin() const { return data; }
  const Token* end() const { return data + size; }
};

// Queries may run in many threads at once; `extend` and `end_sequence` wait for them and exclude
// them.
class SuffixAutomaton {
 public:
  SuffixAutomaton();

  // Appends to the open sequence. Amortised O(log fan-out) of structure, plus one count for each
  // class among the suffixes of the text so far: about ten in ordinary text, as many as the run is
  // long inside a run of one token.
  void extend(TokenView tokens);

  // Closes the open sequence: the next token starts a new one.
  void end_sequence();

  // Length of the longest suffix of `context` that occurs in some sequence. O(context).
  std::size_t longest_match(TokenView context) const;

  // Up to `max_tokens` tokens that continue the longest suffix of `context` which occurs somewhere
  // with a token after it; empty if there is none but the empty one. Each token is the most
  // frequent continuation of that suffix and the tokens drafted so far, the smallest id on a tie;
  // the draft ends where nothing ever followed.
  std::vector<Token> propose(TokenView context, std::size_t max_tokens) const;

  std::size_t num_tokens() const;
  std::size_t num_states() const;
  std::size_t memory_bytes() const;

 private:
  using StateIndex = std::int32_t;
  static constexpr StateIndex kRoot = 0;
  static constexpr StateIndex kNone = -1;

  struct Edge {
    Token token;
    StateIndex target;
  };

  struct State {
    std::int32_t length = 0;         // of the longest string of the class
    StateIndex link = kNone;         // class of the longest suffix with more occurrences
    std::int32_t count = 0;          // occurrences of the strings of the class
    Token best_token = 0;            // most frequent continuation, meaningless without a best_target
    StateIndex best_target = kNone;  // where it leads; kNone if nothing ever followed
    std::vector<Edge> edges;         // sorted by token
  };

  struct Match {
    StateIndex state;
    std::size_t length;
  };

  StateIndex target_of(StateIndex state, Token token) const;
  void set_edge(StateIndex state, Token token, StateIndex target);
  StateIndex add_state(State state);
  StateIndex clone(StateIndex parent, Token token, StateIndex original);
  StateIndex append(Token token);
  void count_occurrence(StateIndex before, StateIndex after, Token token);
  Match match(TokenView context) const;

  mutable std::shared_mutex mutex_;
  std::vector<State> states_;
  StateIndex last_ = kRoot;  // class of the whole open sequence
  std::size_t num_tokens_ = 0;
};

}  // namespace paceline
