// Online suffix automaton over token sequences, with exact continuation counts.
//
// A state stands for a class of strings that end at the same places of the text ("endpos", Blumer
// et al. 1985). Each state keeps how often its strings occurred and which token most often followed
// them, so a draft is read off by one edge per token. Sequences never touch: a sequence starts at
// the root, so no string that crosses two of them is ever in the automaton. Several sequences may
// grow side by side.
//
// One writer, readers without locks: states never move, links, counts and edges are atomic, and
// the state an edge leads to was complete before the edge was stored. A reader sees the text up to
// some token, and perhaps part of the token after it. When a table of edges is replaced by a larger
// one, the old one is kept until no reader is in it: readers hold an `Epochs::Guard`.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "edge_pool.h"
#include "epochs.h"
#include "growing_array.h"

namespace paceline {

// A read-only view of caller-owned tokens.
struct TokenView {
  const Token* data;
  std::size_t size;
  const Token* begin() const { return data; }
  const Token* end() const { return data + size; }
  TokenView last(std::size_t count) const { return {data + size - count, count}; }
};

class SuffixAutomaton {
 public:
  using StateIndex = std::uint32_t;
  static constexpr StateIndex kRoot = 0;

  // A suffix of some text that occurs here: its class and its length.
  struct Position {
    StateIndex state = kRoot;
    std::uint32_t length = 0;
  };

  explicit SuffixAutomaton(Epochs& epochs, Budget* budget = nullptr);

  // Appends to the sequence whose class is `end` (kRoot: a new one) and returns its new class.
  // Amortised O(1) table accesses of structure, plus one count for each class among the suffixes
  // of the sequence so far: about ten in ordinary text. A text that repeats itself has many more,
  // and of those only the `kMaxCounted` longest are counted.
  StateIndex append(StateIndex end, Token token);
  static constexpr int kMaxCounted = 64;

  std::size_t num_tokens() const { return num_tokens_.load(std::memory_order_acquire); }
  std::size_t num_states() const { return num_states_.load(std::memory_order_acquire); }
  std::size_t memory_bytes() const { return sizeof(*this) + states_.bytes() + edges_.bytes(); }

  // The rest may run beside the writer.

  // Moves a position from the longest suffix known of a text to that of the text with more tokens
  // after it: step by step, since nearly every step waits for memory and other walks need not. Each
  // step has asked for what the next one reads, and returns whether there is a next one.
  class Walk {
   public:
    Walk(const SuffixAutomaton& automaton, Position& position, TokenView tokens);
    bool step();

   private:
    bool fall();
    bool arrive(StateIndex state, std::uint32_t length);

    const SuffixAutomaton* automaton_;
    Position* position_;
    TokenView tokens_;
    EdgePool::Table table_ = 0;  // to look the next token up in; 0 before the state is looked at
  };

  // Shortens a match to at most `length` tokens, and to the class that its string has by now.
  void shorten(Position& position, std::uint32_t length) const;

  // The longest suffix of a match that something followed; length 0 if none.
  Position continued(Position position) const;

  // The most frequent continuation, the smallest token on a tie; kNoEdge if nothing ever followed.
  Edge favourite(StateIndex state) const {
    return state_at(state).favourite.load(std::memory_order_acquire);
  }

  // The continuation by `token`; kNoEdge if it never followed.
  Edge continuation(StateIndex state, Token token) const {
    const StateIndex next = target(state, token);
    return next == kRoot ? kNoEdge : make_edge(token, next);
  }

  // Appends every continuation to `edges`, each token once, in no order.
  void continuations(StateIndex state, std::vector<Edge>& edges) const;

  // Asks for the memory of the most frequent continuation.
  void prefetch_favourite(StateIndex state) const {
    const Edge edge = favourite(state);
    if (edge != kNoEdge) prefetch(target_of(edge));
  }

  // How often the strings of the class occurred.
  std::uint32_t count(StateIndex state) const {
    return state_at(state).count.load(std::memory_order_relaxed);
  }

 private:
  struct State {
    std::uint32_t length = 0;                // of the longest string of the class
    std::atomic<StateIndex> link{kRoot};     // class of the longest suffix with more occurrences
    std::atomic<std::uint32_t> count{0};     // occurrences of the strings of the class
    std::atomic<EdgePool::Table> others{0};  // all edges, once there is more than one
    std::atomic<Edge> favourite{kNoEdge};    // most states have this one only
  };
  static constexpr StateIndex kNone = 0xFFFFFFFF;  // the root's link

  State& state_at(StateIndex index) const { return *states_.at(index + states_.kFirst); }
  void prefetch(StateIndex index) const { __builtin_prefetch(&state_at(index)); }
  StateIndex link_of(StateIndex index) const {
    return state_at(index).link.load(std::memory_order_acquire);
  }
  StateIndex target(StateIndex state, Token token) const;
  StateIndex add_state(std::uint32_t length);
  void set_edge(StateIndex state, Edge edge);
  void put_beside(State& state, Edge edge);
  StateIndex extend(StateIndex end, Token token);
  StateIndex clone(StateIndex parent, Token token, StateIndex original);
  void count_occurrence(StateIndex before, StateIndex after, Token token);

  GrowingArray<State> states_;
  EdgePool edges_;
  std::atomic<StateIndex> num_states_{0};
  std::atomic<std::size_t> num_tokens_{0};
};

}  // namespace paceline
