// Edges of states that have more than one: small open-addressing tables in one growing array.

#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "epochs.h"
#include "growing_array.h"

namespace paceline {

using Token = std::int32_t;

// A token and the state it leads to, in one word, so that reads are atomic. 0 is no edge:
// none leads to the root, which is state 0.
using Edge = std::uint64_t;
constexpr Edge kNoEdge = 0;

inline Edge make_edge(Token token, std::uint32_t target) {
  return (static_cast<Edge>(static_cast<std::uint32_t>(token)) << 32) | target;
}
inline Token token_of(Edge edge) { return static_cast<Token>(edge >> 32); }
inline std::uint32_t target_of(Edge edge) { return static_cast<std::uint32_t>(edge); }

// A table is named by one number: its address with the bit of half its size set (it lies at a
// multiple of its size). 0 is the empty table. `find` and `list` may run beside the one writer,
// within an epoch; everything else is the writer's.
class EdgePool {
 public:
  using Table = std::uint32_t;

  EdgePool(Epochs& epochs, Budget* budget) : epochs_(epochs), slots_(budget) {}

  // The edge for `token`; kNoEdge if there is none.
  Edge find(Table table, Token token) const;

  // Appends every edge to `edges`, in no order.
  void list(Table table, std::vector<Edge>& edges) const;

  // Asks for the memory that `find` is about to read.
  void prefetch(Table table, Token token) const;

  // The table with `edge` in place of any other for its token. It may be another table than
  // before: publish it, then `retire` the one before.
  Table put(Table table, Edge edge);

  Table copy(Table table);

  // Frees a table that readers cannot find any more, as soon as none can be in it.
  void retire(Table table);

  std::size_t bytes() const { return slots_.bytes(); }

 private:
  using Slot = std::atomic<Edge>;

  Table allocate(std::uint32_t size);
  Slot* place_for(Table table, Token token) const;
  void reclaim();

  Epochs& epochs_;
  GrowingArray<Slot> slots_;
  std::uint32_t end_ = GrowingArray<Slot>::kFirst;
  std::uint32_t free_[32] = {};  // by the logarithm of the size: the first of a chain through slots
  std::deque<std::pair<std::uint64_t, Table>> retired_;  // with the epoch, oldest first
};

}  // namespace paceline
