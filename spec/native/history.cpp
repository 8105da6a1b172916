#include "history.h"

#include <algorithm>
#include <utility>

namespace paceline {

namespace {

// A generation's places in maps and lists, its names and its share of the problem.
constexpr std::size_t kGenerationBytes = sizeof(Generation) + sizeof(Problem) + 512;
constexpr std::size_t kOpenBytes = sizeof(Generation::Open) + 128;

}  // namespace

Generation::Generation(std::int64_t number, std::uint64_t serial, Epochs& epochs, Budget* budget)
    : number(number),
      serial(serial),
      lease(budget, kGenerationBytes),
      automaton(epochs, budget),
      text(budget) {}

History::History(std::size_t window, std::size_t max_bytes)
    : window_(window), max_bytes_(max_bytes) {}

History::~History() {
  epochs_.wait();
  problems_.clear();  // generations give their bytes back to the budget, which is `this`
}

void History::add(const std::string& problem, std::int64_t generation, TokenView tokens) {
  num_offered_tokens_ += tokens.size;
  write(problem, generation, true, [&](Generation& written) {
    Generation::Open open;
    learn(written, open, tokens);
    keep_text(written, open);
  });
}

void History::extend(const std::string& problem, std::int64_t generation,
                     const std::string& sequence, TokenView tokens) {
  num_offered_tokens_ += tokens.size;
  write(problem, generation, true, [&](Generation& written) {
    if (written.open.find(sequence) == written.open.end()) written.lease.grow(kOpenBytes);
    learn(written, written.open[sequence], tokens);
  });
}

void History::end_sequence(const std::string& problem, std::int64_t generation,
                           const std::string& sequence) {
  write(problem, generation, false, [&](Generation& written) {
    const auto open = written.open.find(sequence);
    if (open == written.open.end()) return;
    keep_text(written, open->second);
    written.open.erase(open);
    written.lease.shrink(kOpenBytes);
  });
}

void History::forget(std::int64_t before) {
  const std::lock_guard lock(writing_);
  first_allowed_ = std::max(first_allowed_, before);
  while (!oldest_first_.empty() && std::get<0>(*oldest_first_.begin()) < before) {
    const auto [number, serial, name] = *oldest_first_.begin();
    drop(name, number);
  }
  epochs_.collect();
}

std::vector<History::Summary> History::summaries() {
  const std::lock_guard lock(writing_);
  std::vector<Summary> result;
  for (const auto& [number, serial, name] : oldest_first_) {
    const Generation& generation = *hold(name)->generations.at(number);
    const SuffixAutomaton& automaton = generation.automaton;
    result.push_back({name, number, automaton.num_tokens(), automaton.num_states(),
                      generation.lease.bytes() + automaton.memory_bytes() + generation.text.bytes()});
  }
  return result;
}

std::vector<std::vector<Token>> History::sequences(const std::string& problem,
                                                   std::int64_t generation) {
  std::vector<std::vector<Token>> result;
  const std::lock_guard lock(writing_);
  std::shared_ptr<Problem> held = hold(problem);
  const auto found = held->generations.find(generation);
  if (found != held->generations.end()) {
    const Generation& read = *found->second;
    for (std::uint32_t at = read.text.kFirst; at < read.text_end;) {
      result.emplace_back(static_cast<std::size_t>(*read.text.at(at++)));
      for (Token& token : result.back()) token = *read.text.at(at++);
    }
    for (const auto& [name, open] : read.open) {
      if (!open.tokens.empty()) result.push_back(open.tokens);
    }
  }
  release(problem, std::move(held));
  return result;
}

// Drops the oldest generations until there is room, once the readers in them have left.
void History::take(std::size_t bytes) {
  while (bytes_ + bytes > max_bytes_) {
    epochs_.wait();
    if (bytes_ + bytes <= max_bytes_) break;
    if (oldest_first_.empty()) throw Full{};
    const auto [number, serial, name] = *oldest_first_.begin();
    if (serial == being_written_) throw Full{};
    drop(name, number);
  }
  bytes_ += bytes;
}

// Changes a generation, made if it is not there and `make`; one that outgrows the cap while it is
// the oldest of all is dropped.
template <class Change>
void History::write(const std::string& name, std::int64_t number, bool make, Change change) {
  const std::lock_guard lock(writing_);
  epochs_.collect();
  std::shared_ptr<Problem> problem = hold(name);
  const auto found = problem->generations.find(number);
  Generation* generation = found != problem->generations.end() ? found->second.get() : nullptr;
  if (generation == nullptr && make) generation = find_or_make(*problem, name, number);
  if (generation != nullptr) {
    being_written_ = generation->serial;
    try {
      change(*generation);
    } catch (const Full&) {
      drop(name, number);
    }
    being_written_ = 0;
  }
  release(name, std::move(problem));
}

// nullptr where the window or the cap has no room for it.
Generation* History::find_or_make(Problem& problem, const std::string& name, std::int64_t number) {
  if (number < std::max(first_allowed_, problem.first_allowed)) return nullptr;
  const bool is_full = problem.generations.size() >= window_;
  if (is_full) {
    const std::int64_t oldest = problem.generations.begin()->first;
    if (number < oldest) return nullptr;
    drop(name, oldest);
  }
  const std::uint64_t serial = next_serial_++;
  const auto place = oldest_first_.emplace(number, serial, name).first;
  being_written_ = serial;
  try {
    std::unique_ptr<Generation> made(new Generation(number, serial, epochs_, this));
    Generation* generation = made.get();
    problem.generations.emplace(number, std::move(made));
    publish(problem);
    return generation;
  } catch (const Full&) {
    being_written_ = 0;
    oldest_first_.erase(place);
    return nullptr;
  }
}

void History::learn(Generation& generation, Generation::Open& open, TokenView tokens) {
  for (const Token token : tokens) {
    if (open.tokens.size() == open.tokens.capacity()) {
      const std::size_t capacity = std::max<std::size_t>(16, open.tokens.size() * 2);
      generation.lease.grow((capacity - open.tokens.capacity()) * sizeof(Token));
      open.tokens.reserve(capacity);
    }
    open.end = generation.automaton.append(open.end, token);
    open.tokens.push_back(token);
    ++num_tokens_;
    ++num_learned_tokens_;
  }
}

// Moves the tokens of a sequence that has ended to where they take no more than they need.
void History::keep_text(Generation& generation, Generation::Open& open) {
  const auto put = [&](Token token) {
    generation.text.allocate(generation.text_end);
    *generation.text.at(generation.text_end++) = token;
  };
  if (!open.tokens.empty()) put(static_cast<Token>(open.tokens.size()));
  for (const Token token : open.tokens) put(token);
  generation.lease.shrink(open.tokens.capacity() * sizeof(Token));
  std::vector<Token>().swap(open.tokens);
}

void History::publish(Problem& problem) {
  Generations* generations = nullptr;
  if (!problem.generations.empty()) {
    generations = new Generations{next_serial_++, {}};
    for (auto each = problem.generations.rbegin(); each != problem.generations.rend(); ++each) {
      generations->newest_first.push_back(each->second.get());
    }
  }
  const Generations* before = problem.published.exchange(generations);
  if (before != nullptr) epochs_.retire([before] { delete before; });
}

// Takes a generation from the readers now; its memory is free when the last of them has left it.
void History::drop(const std::string& name, std::int64_t number) {
  std::shared_ptr<Problem> problem = hold(name);
  Generation* dropped = problem->generations.at(number).release();
  problem->generations.erase(number);
  problem->first_allowed =
      problem->generations.empty() ? INT64_MIN : std::max(problem->first_allowed, number + 1);
  publish(*problem);
  oldest_first_.erase({number, dropped->serial, name});
  num_tokens_ -= dropped->automaton.num_tokens();
  ++num_dropped_generations_;
  epochs_.retire([dropped] { delete dropped; });
  release(name, std::move(problem));
}

std::size_t History::num_problems() {
  const std::lock_guard lock(looking_up_);
  return problems_.size();
}

std::shared_ptr<Problem> History::hold(const std::string& name) {
  const std::lock_guard lock(looking_up_);
  std::shared_ptr<Problem>& problem = problems_[name];
  if (problem == nullptr) problem = std::make_shared<Problem>();
  return problem;
}

// Releases a problem; it is erased if it has no text and no other holder.
void History::release(const std::string& name, std::shared_ptr<Problem> problem) {
  const std::lock_guard lock(looking_up_);
  const bool is_unknown = problem->published.load() == nullptr;
  if (is_unknown && problem.use_count() == 2) problems_.erase(name);
  problem.reset();
}

}  // namespace paceline
