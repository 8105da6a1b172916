// Drafts for the requests of one engine, from a history that may grow meanwhile.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "history.h"

namespace paceline {

// Which of the known text a draft follows, see `Reader`.
struct DraftRule {
  std::uint32_t min_match;
  std::uint32_t max_match;
  double decay;
};

// Requests and the tokens each has grown by: `num_tokens[i]` of `tokens` belong to request i.
struct DraftBatch {
  const std::int64_t* requests;
  std::size_t size;
  TokenView tokens;
  const std::int32_t* num_tokens;
  const std::int32_t* max_draft;
};

// Row i of `tokens` and `probabilities` is request i's draft, `width` wide.
struct Drafts {
  std::size_t width;
  Token* tokens;
  float* probabilities;
  std::int32_t* num_tokens;
  std::int32_t* matches;
  std::int64_t* generations;
};

// Of each generation of the request's problem, take the longest suffix of the request's text, of
// `max_match` tokens at most, that something followed there. Those with the longest, if it has
// `min_match` tokens, vote: for the token that most often followed (the smallest on a tie), with
// the number of times it did times decay^age, the age counted in generations of the problem. The
// token with most votes is drafted (on a tie that of the newer generation); those who voted for it
// go on with the text they followed, the others drop out. Its probability is estimated as its votes
// by the number of times that the voters' text occurred, equally weighted; the draft ends before
// the product of these falls below `min_probability`, or where nothing ever followed.
//
// For a request opened with a seed every continuation gets votes, and the token is drafted
// that has the most of log(votes) + noise, the noise of the verifier (`noise.h`).
//
// Used by one thread at a time; any number of readers may share a history. Within `propose` nothing
// waits for the writer.
class Reader {
 public:
  Reader(std::shared_ptr<History> history, DraftRule rule);
  ~Reader();

  // A request with no text yet, for a problem that may be unknown yet. `position` is that of the
  // first token it will be given: noise belongs to positions.
  std::int64_t open(const std::string& problem, std::optional<std::int64_t> seed,
                    std::int64_t position);
  void close(std::int64_t request);

  // Takes the new tokens of every request and drafts after them. Throws std::invalid_argument,
  // with nothing taken, where a request is unknown or named twice or the numbers do not add up.
  void propose(const DraftBatch& batch, double min_probability, const Drafts& drafts);

  std::size_t num_requests() const { return requests_.size(); }

 private:
  // Where a request's text is in one generation's automaton.
  struct Place {
    const Generation* generation;  // of the list of `list_serial`, alive while that is published
    std::uint64_t serial;
    std::size_t num_tokens_seen;
    SuffixAutomaton::Position position;  // of the longest match, or of one of `max_match` or more
  };
  struct Request {
    std::string name;
    std::shared_ptr<Problem> problem;
    std::uint64_t batch = 0;  // the last that it was in
    std::uint64_t list_serial = 0;
    std::vector<Place> places;  // newest generation first
    std::vector<Token> tail;    // at least the last `max_match` tokens of the text
    std::uint64_t position = 0;          // of the token after its text
    std::optional<std::uint64_t> noise;  // the stream of its positions' streams
  };
  struct Ballot {
    Token token;
    double votes;
  };
  // A match that was looked for among the last `size` tokens of a tail alone.
  struct Try {
    Place* place;
    std::size_t size;
    TokenView tail;
  };
  struct Voter {
    const Generation* generation;
    double weight;
    SuffixAutomaton::StateIndex state;
    std::uint32_t length;
    Edge choice;
    double votes;
  };

  // A request in a batch, with its voters among `voters_`.
  struct Row {
    Request* request;
    std::size_t first;
    std::size_t last;
    double all_right;  // the probability that the draft so far is
  };
  struct Voters {
    Voter* first;
    Voter* last;
    Voter* begin() const { return first; }
    Voter* end() const { return last; }
  };

  void check(const DraftBatch& batch, const Drafts& drafts);
  void follow(Request& request, TokenView tokens);
  void follow_generations(Request& request) const;
  void follow(Place& place, TokenView tail, TokenView tokens);
  void follow_further();
  void walk();
  void gather_voters(Row& row);
  void begin_draft(std::size_t row, const Drafts& drafts) const;
  bool draft_token(std::size_t row, const Drafts& drafts, double min_probability);
  const Voter* count_votes(Voters voters, double& probability);
  const Voter* count_votes_with_noise(Voters voters, std::uint64_t noise, double& probability);

  const std::shared_ptr<History> history_;
  const DraftRule rule_;
  std::int64_t next_request_ = 0;
  std::unordered_map<std::int64_t, Request> requests_;
  std::uint64_t num_batches_ = 0;
  // Of the batch at hand:
  std::vector<Row> rows_;
  std::vector<std::size_t> open_rows_;  // whose drafts go on
  std::vector<SuffixAutomaton::Walk> walks_;
  std::vector<Try> tries_;
  std::vector<Voter> voters_;
  std::vector<Ballot> ballots_;  // of one request's next token
  std::vector<Edge> edges_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

}  // namespace paceline
