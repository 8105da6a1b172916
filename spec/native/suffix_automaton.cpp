#include "suffix_automaton.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace paceline {

SuffixAutomaton::SuffixAutomaton() : states_(1) {}

void SuffixAutomaton::extend(TokenView tokens) {
  const std::unique_lock lock(mutex_);
  for (const Token token : tokens) {
    const StateIndex before = last_;
    last_ = append(token);
    count_occurrence(before, last_, token);
    ++num_tokens_;
  }
}

void SuffixAutomaton::end_sequence() {
  const std::unique_lock lock(mutex_);
  last_ = kRoot;
}

std::size_t SuffixAutomaton::longest_match(TokenView context) const {
  const std::shared_lock lock(mutex_);
  return match(context).length;
}

std::vector<Token> SuffixAutomaton::propose(TokenView context, std::size_t max_tokens) const {
  const std::shared_lock lock(mutex_);
  StateIndex state = match(context).state;
  while (state != kRoot && states_[state].best_target == kNone) state = states_[state].link;
  std::vector<Token> draft;
  if (state == kRoot) return draft;
  while (draft.size() < max_tokens && states_[state].best_target != kNone) {
    draft.push_back(states_[state].best_token);
    state = states_[state].best_target;
  }
  return draft;
}

std::size_t SuffixAutomaton::num_tokens() const {
  const std::shared_lock lock(mutex_);
  return num_tokens_;
}

std::size_t SuffixAutomaton::num_states() const {
  const std::shared_lock lock(mutex_);
  return states_.size();
}

std::size_t SuffixAutomaton::memory_bytes() const {
  const std::shared_lock lock(mutex_);
  std::size_t bytes = sizeof(*this) + states_.capacity() * sizeof(State);
  for (const State& state : states_) bytes += state.edges.capacity() * sizeof(Edge);
  return bytes;
}

SuffixAutomaton::Match SuffixAutomaton::match(TokenView context) const {
  Match match{kRoot, 0};
  for (const Token token : context) {
    StateIndex target = target_of(match.state, token);
    while (target == kNone && match.state != kRoot) {
      match.state = states_[match.state].link;
      match.length = static_cast<std::size_t>(states_[match.state].length);
      target = target_of(match.state, token);
    }
    if (target != kNone) match = {target, match.length + 1};
  }
  return match;
}

// Puts the open sequence plus `token` into the automaton and returns its class, occurrence not yet
// counted. The generalised construction: where an earlier sequence already led the way, no state is
// made.
SuffixAutomaton::StateIndex SuffixAutomaton::append(Token token) {
  const std::int32_t length = states_[last_].length + 1;
  const StateIndex known = target_of(last_, token);
  if (known != kNone) {
    return states_[known].length == length ? known : clone(last_, token, known);
  }
  State fresh;
  fresh.length = length;
  const StateIndex added = add_state(std::move(fresh));
  StateIndex parent = last_;
  StateIndex target = kNone;
  while (parent != kNone && (target = target_of(parent, token)) == kNone) {
    set_edge(parent, token, added);
    parent = states_[parent].link;
  }
  StateIndex link = kRoot;
  if (parent != kNone) {
    const bool fits = states_[target].length == states_[parent].length + 1;
    link = fits ? target : clone(parent, token, target);
  }
  states_[added].link = link;
  return added;
}

// Splits off the strings of `original` that are no longer than parent's longest plus `token`: they
// are about to occur where the longer ones do not. Counts and continuations were the same until
// now, so the copy keeps them.
SuffixAutomaton::StateIndex SuffixAutomaton::clone(StateIndex parent, Token token,
                                                   StateIndex original) {
  State copy = states_[original];
  copy.length = states_[parent].length + 1;
  const StateIndex cloned = add_state(std::move(copy));
  states_[original].link = cloned;
  for (; parent != kNone && target_of(parent, token) == original; parent = states_[parent].link) {
    set_edge(parent, token, cloned);
  }
  return cloned;
}

// Every suffix of the open sequence before `token` has now been followed by it once more, and every
// suffix after it has occurred once more. The former lead to the latter, and only their favourites
// can have changed. A favourite that `clone` redirected has just outgrown its own old target.
void SuffixAutomaton::count_occurrence(StateIndex before, StateIndex after, Token token) {
  for (StateIndex state = after; state != kRoot; state = states_[state].link) ++states_[state].count;
  for (StateIndex index = before; index != kNone; index = states_[index].link) {
    State& state = states_[index];
    const StateIndex target = target_of(index, token);
    const std::int32_t count = states_[target].count;
    const std::int32_t best = state.best_target == kNone ? 0 : states_[state.best_target].count;
    if (count > best || (count == best && token < state.best_token)) {
      state.best_token = token;
      state.best_target = target;
    }
  }
}

SuffixAutomaton::StateIndex SuffixAutomaton::target_of(StateIndex state, Token token) const {
  const std::vector<Edge>& edges = states_[state].edges;
  const auto found = std::lower_bound(edges.begin(), edges.end(), token,
                                      [](const Edge& edge, Token t) { return edge.token < t; });
  return found != edges.end() && found->token == token ? found->target : kNone;
}

void SuffixAutomaton::set_edge(StateIndex state, Token token, StateIndex target) {
  std::vector<Edge>& edges = states_[state].edges;
  const auto found = std::lower_bound(edges.begin(), edges.end(), token,
                                      [](const Edge& edge, Token t) { return edge.token < t; });
  if (found != edges.end() && found->token == token) {
    found->target = target;
  } else {
    edges.insert(found, Edge{token, target});
  }
}

SuffixAutomaton::StateIndex SuffixAutomaton::add_state(State state) {
  if (states_.size() >= static_cast<std::size_t>(std::numeric_limits<StateIndex>::max())) {
    throw std::length_error("a suffix automaton holds at most 2**31 - 1 states: start a new one");
  }
  states_.push_back(std::move(state));
  return static_cast<StateIndex>(states_.size() - 1);
}

}  // namespace paceline
