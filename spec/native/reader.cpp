#include "reader.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "noise.h"

namespace paceline {

namespace {

// A processor has some ten to twenty requests for memory on their way at once.
constexpr std::size_t kWalksAtATime = 16;

// Where nothing is known of a match, so many tokens are tried first: few matches are longer
// when a request begins (a trace begins with eight tokens of its prompt).
constexpr std::size_t kFirstTry = 12;

class OneThread {
 public:
  explicit OneThread(std::atomic_flag& busy) : busy_(busy) {
    if (busy_.test_and_set(std::memory_order_acquire)) {
      throw std::runtime_error("two threads use one reader: give each its own");
    }
  }
  ~OneThread() { busy_.clear(std::memory_order_release); }

 private:
  std::atomic_flag& busy_;
};

std::string unknown(std::int64_t request) {
  return "request " + std::to_string(request) + " is not open";
}

}  // namespace

Reader::Reader(std::shared_ptr<History> history, DraftRule rule)
    : history_(std::move(history)), rule_(rule) {}

Reader::~Reader() {
  for (auto& [number, request] : requests_) {
    history_->release(request.name, std::move(request.problem));
  }
}

std::int64_t Reader::open(const std::string& problem, std::optional<std::int64_t> seed,
                          std::int64_t position) {
  const OneThread here(busy_);
  const std::int64_t request = next_request_++;
  Request& opened = requests_[request];
  opened.name = problem;
  opened.problem = history_->hold(problem);
  opened.position = static_cast<std::uint64_t>(position);
  if (seed) opened.noise = draw(0, static_cast<std::uint64_t>(*seed));
  return request;
}

void Reader::close(std::int64_t request) {
  const OneThread here(busy_);
  const auto found = requests_.find(request);
  if (found == requests_.end()) throw std::invalid_argument(unknown(request));
  history_->release(found->second.name, std::move(found->second.problem));
  requests_.erase(found);
}

void Reader::propose(const DraftBatch& batch, double min_probability, const Drafts& drafts) {
  const OneThread here(busy_);
  check(batch, drafts);
  const Epochs::Guard guard(history_->epochs_);
  const Token* tokens = batch.tokens.data;
  for (std::size_t row = 0; row < batch.size; ++row) {
    const auto num_tokens = static_cast<std::size_t>(batch.num_tokens[row]);
    follow(*rows_[row].request, {tokens, num_tokens});
    tokens += num_tokens;
  }
  walk();
  follow_further();
  voters_.clear();
  open_rows_.clear();
  for (std::size_t row = 0; row < batch.size; ++row) {
    gather_voters(rows_[row]);
    begin_draft(row, drafts);
    if (batch.max_draft[row] > 0) open_rows_.push_back(row);
  }
  while (!open_rows_.empty()) {  // one token for each: while one waits for memory, others go on
    const auto is_over = [&](std::size_t row) {
      return !draft_token(row, drafts, min_probability) ||
             drafts.num_tokens[row] == batch.max_draft[row];
    };
    open_rows_.erase(std::remove_if(open_rows_.begin(), open_rows_.end(), is_over),
                     open_rows_.end());
  }
}

void Reader::check(const DraftBatch& batch, const Drafts& drafts) {
  std::size_t num_tokens = 0;
  ++num_batches_;
  rows_.clear();
  walks_.clear();
  tries_.clear();
  for (std::size_t row = 0; row < batch.size; ++row) {
    const auto found = requests_.find(batch.requests[row]);
    if (found == requests_.end()) throw std::invalid_argument(unknown(batch.requests[row]));
    Request& request = found->second;
    if (request.batch == num_batches_) {
      throw std::invalid_argument("request " + std::to_string(found->first) + " is named twice");
    }
    request.batch = num_batches_;
    rows_.push_back({&request, 0, 0, 1.0});
    if (batch.num_tokens[row] < 0 || batch.max_draft[row] < 0 ||
        static_cast<std::size_t>(batch.max_draft[row]) > drafts.width) {
      throw std::invalid_argument("numbers of tokens must not be negative, nor max_draft above " +
                                  std::to_string(drafts.width));
    }
    num_tokens += static_cast<std::size_t>(batch.num_tokens[row]);
  }
  if (num_tokens != batch.tokens.size) {
    throw std::invalid_argument("num_tokens adds up to " + std::to_string(num_tokens) + ", but " +
                                std::to_string(batch.tokens.size) + " tokens were given");
  }
}

void Reader::follow(Request& request, TokenView tokens) {
  request.position += tokens.size;
  request.tail.insert(request.tail.end(), tokens.begin(), tokens.end());
  if (request.tail.size() > 4 * std::size_t{rule_.max_match}) {
    request.tail.erase(request.tail.begin(), request.tail.end() - rule_.max_match);
  }
  follow_generations(request);
  const TokenView tail{request.tail.data(), request.tail.size()};
  const TokenView matched = tail.last(std::min<std::size_t>(tail.size, rule_.max_match));
  for (Place& place : request.places) follow(place, matched, tokens);
}

// One place for each generation that the problem has now.
void Reader::follow_generations(Request& request) const {
  const Generations* list = request.problem->published.load(std::memory_order_acquire);
  const std::uint64_t serial = list == nullptr ? 0 : list->serial;
  if (serial == request.list_serial) return;
  std::vector<Place> places;
  for (std::size_t index = 0; list != nullptr && index < list->newest_first.size(); ++index) {
    const Generation* generation = list->newest_first[index];
    places.push_back({generation, generation->serial, 0, {}});
    for (const Place& place : request.places) {
      if (place.serial == generation->serial) places.back() = place;
    }
  }
  request.places = std::move(places);
  request.list_serial = serial;
}

// A match stays the longest as long as its automaton does not grow, and long enough always if it
// has `max_match` tokens. Else the tail is matched anew, and nothing older: no request is ever read
// as a whole.
void Reader::follow(Place& place, TokenView tail, TokenView tokens) {
  const SuffixAutomaton& automaton = place.generation->automaton;
  const std::size_t num_tokens = automaton.num_tokens();
  const bool has_grown = num_tokens != place.num_tokens_seen;
  place.num_tokens_seen = num_tokens;
  if (tokens.size >= tail.size || (has_grown && place.position.length < rule_.max_match)) {
    const std::size_t likely = tokens.size < tail.size ? place.position.length + tokens.size : 0;
    place.position = {};
    tokens = tail.last(std::min(tail.size, std::max(likely + 1, kFirstTry)));
    if (tokens.size < tail.size) tries_.push_back({&place, tokens.size, tail});
  } else if (has_grown) {
    automaton.shorten(place.position, place.position.length);
  }
  walks_.emplace_back(automaton, place.position, tokens);
}

// All that a try was given matched: more may.
void Reader::follow_further() {
  for (const Try& tried : tries_) {
    if (tried.place->position.length < tried.size) continue;
    tried.place->position = {};
    walks_.emplace_back(tried.place->generation->automaton, tried.place->position, tried.tail);
  }
  tries_.clear();
  walk();
}

// Takes all walks to their ends, by turns: while one waits for memory, others go on.
void Reader::walk() {
  std::size_t last = std::min(kWalksAtATime, walks_.size());
  std::size_t next = last;
  while (last > 0) {
    for (std::size_t index = 0; index < last;) {
      SuffixAutomaton::Walk& walk = walks_[index];
      if (walk.step()) {
        ++index;
      } else if (next < walks_.size()) {
        walk = walks_[next++];
      } else {
        walk = walks_[--last];
      }
    }
  }
  walks_.clear();
}

void Reader::gather_voters(Row& row) {
  row.first = voters_.size();
  std::uint32_t longest = rule_.min_match;
  double weight = 1.0;
  for (const Place& place : row.request->places) {
    const SuffixAutomaton& automaton = place.generation->automaton;
    SuffixAutomaton::Position match = place.position;
    if (match.length > rule_.max_match) automaton.shorten(match, rule_.max_match);
    match = automaton.continued(match);
    if (match.length > longest) voters_.resize(row.first);
    if (match.length >= longest) {
      longest = match.length;
      voters_.push_back({place.generation, weight, match.state, match.length, kNoEdge, 0.0});
      automaton.prefetch_favourite(match.state);
    }
    weight *= rule_.decay;
  }
  row.last = voters_.size();
}

void Reader::begin_draft(std::size_t index, const Drafts& drafts) const {
  const Row& row = rows_[index];
  const bool is_known = row.first != row.last;
  drafts.matches[index] = is_known ? static_cast<std::int32_t>(voters_[row.first].length) : 0;
  drafts.generations[index] = -1;
  drafts.num_tokens[index] = 0;
}

// False where the draft ends before its next token.
bool Reader::draft_token(std::size_t index, const Drafts& drafts, double min_probability) {
  Row& row = rows_[index];
  const Voters voters{voters_.data() + row.first, voters_.data() + row.last};
  const std::int32_t drafted = drafts.num_tokens[index];
  double probability = 0.0;
  const Request& request = *row.request;
  const std::uint64_t position = request.position + static_cast<std::uint64_t>(drafted);
  const Voter* winner =
      request.noise ? count_votes_with_noise(voters, draw(*request.noise, position), probability)
                    : count_votes(voters, probability);
  row.all_right *= probability;
  if (winner == nullptr || row.all_right < min_probability) return false;
  const Token token = token_of(winner->choice);
  if (drafted == 0) drafts.generations[index] = winner->generation->number;
  const std::size_t at = index * drafts.width + static_cast<std::size_t>(drafted);
  drafts.tokens[at] = token;
  drafts.probabilities[at] = static_cast<float>(probability);
  drafts.num_tokens[index] = drafted + 1;
  row.last = row.first;
  for (const Voter& voter : voters) {
    if (voter.choice == kNoEdge || token_of(voter.choice) != token) continue;
    Voter& kept = voters_[row.last++] = voter;
    kept.state = target_of(kept.choice);
    kept.generation->automaton.prefetch_favourite(kept.state);
  }
  return true;
}

// The newest voter for the token with most votes; nullptr if none has a continuation.
const Reader::Voter* Reader::count_votes(Voters voters, double& probability) {
  double all = 0.0;
  for (Voter& voter : voters) {
    const SuffixAutomaton& automaton = voter.generation->automaton;
    voter.choice = automaton.favourite(voter.state);
    const std::uint32_t followed =
        voter.choice == kNoEdge ? 0 : automaton.count(target_of(voter.choice));
    voter.votes = voter.weight * followed;
    // A writer at work may have counted the continuation and not yet what it continues.
    all += voter.weight * std::max(automaton.count(voter.state), followed);
  }
  const Voter* winner = nullptr;
  double most = 0.0;
  for (Voter& candidate : voters) {
    if (candidate.votes <= 0.0) continue;  // no vote, or counted with a newer one's
    double votes = candidate.votes;
    for (Voter* other = &candidate + 1; other != voters.end(); ++other) {
      if (token_of(other->choice) != token_of(candidate.choice)) continue;
      votes += other->votes;
      other->votes = 0.0;
    }
    if (votes > most) {
      most = votes;
      winner = &candidate;
    }
  }
  probability = winner == nullptr ? 0.0 : most / all;
  return winner;
}

// The newest voter for the token with the most of log(votes) + noise. All continuations count, not
// only favourites: which of them the noise prefers is different at every position.
const Reader::Voter* Reader::count_votes_with_noise(Voters voters, std::uint64_t noise,
                                                             double& probability) {
  ballots_.clear();
  double all = 0.0;
  for (const Voter& voter : voters) {
    const SuffixAutomaton& automaton = voter.generation->automaton;
    edges_.clear();
    automaton.continuations(voter.state, edges_);
    std::uint32_t followed = 0;
    for (const Edge edge : edges_) {
      const std::uint32_t count = automaton.count(target_of(edge));
      ballots_.push_back({token_of(edge), voter.weight * count});
      followed = std::max(followed, count);
    }
    all += voter.weight * std::max(automaton.count(voter.state), followed);
  }
  std::sort(ballots_.begin(), ballots_.end(),
            [](const Ballot& one, const Ballot& other) { return one.token < other.token; });
  double highest = -std::numeric_limits<double>::infinity();
  Ballot winner{0, 0.0};
  for (auto ballot = ballots_.begin(); ballot != ballots_.end();) {
    Ballot candidate{ballot->token, 0.0};
    for (; ballot != ballots_.end() && ballot->token == candidate.token; ++ballot) {
      candidate.votes += ballot->votes;
    }
    if (candidate.votes <= 0.0) continue;  // a writer at work has not counted it yet
    const std::uint64_t bits = draw(noise, static_cast<std::uint32_t>(candidate.token));
    const double score = std::log(candidate.votes) + gumbel(bits);
    if (score <= highest) continue;
    highest = score;
    winner = candidate;
  }
  if (winner.votes <= 0.0) return nullptr;
  probability = winner.votes / all;
  const Voter* newest = nullptr;
  for (Voter& voter : voters) {
    voter.choice = voter.generation->automaton.continuation(voter.state, winner.token);
    if (newest == nullptr && voter.choice != kNoEdge) newest = &voter;
  }
  return newest;
}

}  // namespace paceline
