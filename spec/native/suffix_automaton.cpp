#include "suffix_automaton.h"

#include <algorithm>
#include <stdexcept>

namespace paceline {

SuffixAutomaton::SuffixAutomaton(Epochs& epochs, Budget* budget)
    : states_(budget), edges_(epochs, budget) {
  add_state(0);
  state_at(kRoot).link = kNone;
}

SuffixAutomaton::StateIndex SuffixAutomaton::append(StateIndex end, Token token) {
  const StateIndex after = extend(end, token);
  count_occurrence(end, after, token);
  num_tokens_.fetch_add(1, std::memory_order_release);
  return after;
}

SuffixAutomaton::Walk::Walk(const SuffixAutomaton& automaton, Position& position, TokenView tokens)
    : automaton_(&automaton), position_(&position), tokens_(tokens) {
  automaton_->prefetch(position_->state);
}

// Either looks at a state, whose favourite edge most tokens take, or into the table of its others.
bool SuffixAutomaton::Walk::step() {
  if (tokens_.size == 0) return false;
  const Token token = *tokens_.data;
  Edge edge = kNoEdge;
  if (table_ == 0) {
    const State& state = automaton_->state_at(position_->state);
    position_->length = std::min(position_->length, state.length);  // shorter where it fell to it
    edge = state.favourite.load(std::memory_order_acquire);
    if (edge == kNoEdge || token_of(edge) != token) {
      table_ = state.others.load(std::memory_order_acquire);
      if (table_ == 0) return fall();
      automaton_->edges_.prefetch(table_, token);
      return true;
    }
  } else {
    edge = automaton_->edges_.find(table_, token);
    table_ = 0;
    if (edge == kNoEdge) return fall();
  }
  return arrive(target_of(edge), position_->length + 1);
}

// The token never followed here: it may have followed the next shorter suffix, or nothing.
bool SuffixAutomaton::Walk::fall() {
  const StateIndex state = position_->state;
  if (state == kRoot) return arrive(kRoot, 0);
  position_->state = automaton_->link_of(state);
  automaton_->prefetch(position_->state);
  return true;
}

bool SuffixAutomaton::Walk::arrive(StateIndex state, std::uint32_t length) {
  *position_ = {state, length};
  automaton_->prefetch(state);
  tokens_ = tokens_.last(tokens_.size - 1);
  return tokens_.size != 0;
}

void SuffixAutomaton::shorten(Position& position, std::uint32_t length) const {
  position.length = std::min(position.length, length);
  while (position.state != kRoot) {
    const StateIndex link = link_of(position.state);
    if (state_at(link).length < position.length) return;
    position.state = link;
  }
}

SuffixAutomaton::Position SuffixAutomaton::continued(Position position) const {
  while (position.state != kRoot && favourite(position.state) == kNoEdge) {
    position.state = link_of(position.state);
    position.length = std::min(position.length, state_at(position.state).length);
  }
  return position;
}

void SuffixAutomaton::continuations(StateIndex state, std::vector<Edge>& edges) const {
  const Edge best = favourite(state);
  if (best == kNoEdge) return;
  const std::size_t first = edges.size();
  edges.push_back(best);
  edges_.list(state_at(state).others.load(std::memory_order_acquire), edges);
  for (std::size_t index = first + 1; index < edges.size(); ++index) {
    if (token_of(edges[index]) != token_of(best)) continue;
    edges[index] = edges.back();
    edges.pop_back();
    return;
  }
}

// Puts the sequence `end` plus `token` into the automaton and returns its class, occurrence not yet
// counted. The generalised construction: where an earlier sequence already led the way, no state is
// made. A new state is complete before the first edge leads to it.
SuffixAutomaton::StateIndex SuffixAutomaton::extend(StateIndex end, Token token) {
  const std::uint32_t length = state_at(end).length + 1;
  const StateIndex known = target(end, token);
  if (known != kRoot) return state_at(known).length == length ? known : clone(end, token, known);

  const StateIndex added = add_state(length);
  StateIndex parent = end;
  StateIndex found = kRoot;
  while (parent != kNone && (found = target(parent, token)) == kRoot) parent = link_of(parent);
  if (parent != kNone) {
    const bool fits = state_at(found).length == state_at(parent).length + 1;
    state_at(added).link = fits ? found : clone(parent, token, found);
  }
  for (StateIndex state = end; state != parent; state = link_of(state)) {
    set_edge(state, make_edge(token, added));
  }
  return added;
}

// Splits off the strings of `original` that are no longer than parent's longest plus `token`: they
// are about to occur where the longer ones do not. Counts and continuations were the same until
// now, so the copy keeps them. A reader that still finds `original` by one of those strings is set
// right by `shorten`.
SuffixAutomaton::StateIndex SuffixAutomaton::clone(StateIndex parent, Token token,
                                                   StateIndex original) {
  const StateIndex cloned = add_state(state_at(parent).length + 1);
  State& from = state_at(original);
  State& to = state_at(cloned);
  to.link = from.link.load();
  to.count = from.count.load();
  to.others = edges_.copy(from.others);
  to.favourite = from.favourite.load();
  from.link.store(cloned, std::memory_order_release);
  for (; parent != kNone && target(parent, token) == original; parent = link_of(parent)) {
    set_edge(parent, make_edge(token, cloned));
  }
  return cloned;
}

// Every suffix of the sequence before `token` has now been followed by it once more, and every
// suffix after it has occurred once more. The former lead to the latter, and only their favourites
// can have changed: a favourite that `clone` redirected has just outgrown its own old target.
void SuffixAutomaton::count_occurrence(StateIndex before, StateIndex after, Token token) {
  StateIndex ending = after;
  for (int i = 0; i < kMaxCounted && ending != kRoot; ++i, ending = link_of(ending)) {
    state_at(ending).count.store(count(ending) + 1, std::memory_order_relaxed);  // no other writer
  }
  StateIndex target = after;
  for (int i = 0; i < kMaxCounted && before != kNone; ++i, before = link_of(before)) {
    State& state = state_at(before);
    while (state_at(link_of(target)).length > state.length) target = link_of(target);
    const Edge favourite = state.favourite.load(std::memory_order_relaxed);
    if (token_of(favourite) == token) continue;
    const std::uint32_t most = count(target_of(favourite));
    const std::uint32_t now = count(target);
    if (now > most || (now == most && token < token_of(favourite))) {
      put_beside(state, favourite);
      state.favourite.store(make_edge(token, target), std::memory_order_release);
    }
  }
}

SuffixAutomaton::StateIndex SuffixAutomaton::target(StateIndex index, Token token) const {
  const State& state = state_at(index);
  const Edge favourite = state.favourite.load(std::memory_order_acquire);
  if (favourite != kNoEdge && token_of(favourite) == token) return target_of(favourite);
  return target_of(edges_.find(state.others.load(std::memory_order_acquire), token));
}

void SuffixAutomaton::set_edge(StateIndex index, Edge edge) {
  State& state = state_at(index);
  const Edge favourite = state.favourite.load(std::memory_order_relaxed);
  const bool is_favourite = favourite == kNoEdge || token_of(favourite) == token_of(edge);
  const EdgePool::Table others = state.others.load(std::memory_order_relaxed);
  if (!is_favourite || edges_.find(others, token_of(edge)) != kNoEdge) put_beside(state, edge);
  if (is_favourite) state.favourite.store(edge, std::memory_order_release);
}

void SuffixAutomaton::put_beside(State& state, Edge edge) {
  const EdgePool::Table before = state.others.load(std::memory_order_relaxed);
  const EdgePool::Table after = edges_.put(before, edge);
  if (after == before) return;
  state.others.store(after, std::memory_order_release);
  edges_.retire(before);
}

SuffixAutomaton::StateIndex SuffixAutomaton::add_state(std::uint32_t length) {
  const StateIndex index = num_states_.load(std::memory_order_relaxed);
  if (index >= kNone - states_.kFirst - 1) {
    throw std::length_error("a suffix automaton holds at most 2**32 states: start a new one");
  }
  states_.allocate(index + states_.kFirst);
  state_at(index).length = length;
  num_states_.store(index + 1, std::memory_order_release);
  return index;
}

}  // namespace paceline
