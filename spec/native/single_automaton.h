// One suffix automaton with its own lock for writers: queries run in any number of threads.

#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "epochs.h"
#include "suffix_automaton.h"

namespace paceline {

class SingleAutomaton {
 public:
  SingleAutomaton() : automaton_(epochs_) {}

  // Appends to the open sequence.
  void extend(TokenView tokens) {
    const std::lock_guard lock(writing_);
    for (const Token token : tokens) end_ = automaton_.append(end_, token);
  }

  // Closes the open sequence: the next token starts a new one.
  void end_sequence() {
    const std::lock_guard lock(writing_);
    end_ = SuffixAutomaton::kRoot;
  }

  // Length of the longest suffix of `context` that occurs in some sequence. O(context).
  std::size_t longest_match(TokenView context) const {
    const Epochs::Guard guard(epochs_);
    return match(context).length;
  }

  // Up to `max_tokens` tokens that continue the longest suffix of `context` which occurs somewhere
  // with a token after it; empty if there is none but the empty one. Each token is the most
  // frequent continuation of that suffix and the tokens drafted so far, the smallest id on a tie;
  // the draft ends where nothing ever followed.
  std::vector<Token> propose(TokenView context, std::size_t max_tokens) const {
    const Epochs::Guard guard(epochs_);
    std::vector<Token> draft;
    auto state = automaton_.continued(match(context)).state;
    if (state == SuffixAutomaton::kRoot) return draft;
    for (Edge next; draft.size() < max_tokens; state = target_of(next)) {
      next = automaton_.favourite(state);
      if (next == kNoEdge) break;
      draft.push_back(token_of(next));
    }
    return draft;
  }

  std::size_t num_tokens() const { return automaton_.num_tokens(); }
  std::size_t num_states() const { return automaton_.num_states(); }
  std::size_t memory_bytes() const {
    const std::lock_guard lock(writing_);
    return automaton_.memory_bytes();
  }

 private:
  SuffixAutomaton::Position match(TokenView context) const {
    SuffixAutomaton::Position position;
    SuffixAutomaton::Walk walk(automaton_, position, context);
    while (walk.step()) {
    }
    return position;
  }

  Epochs epochs_;
  SuffixAutomaton automaton_;
  SuffixAutomaton::StateIndex end_ = SuffixAutomaton::kRoot;
  mutable std::mutex writing_;
};

}  // namespace paceline
