#include "edge_pool.h"

#include <algorithm>
#include <stdexcept>

namespace paceline {

namespace {

constexpr std::uint32_t kMaxProbes = 16;  // two cache lines; a table in need of more is doubled

std::uint32_t size_of(EdgePool::Table table) { return (table & (~table + 1)) * 2; }
std::uint32_t address_of(EdgePool::Table table) { return table & (table - 1); }

// Neighbouring token ids must not crowd each other (the finaliser of MurmurHash3).
std::uint32_t scatter(Token token) {
  std::uint32_t bits = static_cast<std::uint32_t>(token);
  bits = (bits ^ (bits >> 16)) * 0x85ebca6bU;
  bits = (bits ^ (bits >> 13)) * 0xc2b2ae35U;
  return bits ^ (bits >> 16);
}

}  // namespace

Edge EdgePool::find(Table table, Token token) const {
  if (table == 0) return kNoEdge;
  const Slot* slot = place_for(table, token);
  const Edge edge = slot == nullptr ? kNoEdge : slot->load(std::memory_order_acquire);
  return edge != kNoEdge && token_of(edge) == token ? edge : kNoEdge;
}

void EdgePool::list(Table table, std::vector<Edge>& edges) const {
  if (table == 0) return;
  const Slot* slots = slots_.at(address_of(table));
  for (std::uint32_t index = 0; index < size_of(table); ++index) {
    const Edge edge = slots[index].load(std::memory_order_acquire);
    if (edge != kNoEdge) edges.push_back(edge);
  }
}

void EdgePool::prefetch(Table table, Token token) const {
  __builtin_prefetch(slots_.at(address_of(table)) + (scatter(token) & (size_of(table) - 1)));
}

EdgePool::Table EdgePool::put(Table table, Edge edge) {
  if (table == 0) table = allocate(2);
  Slot* slot = place_for(table, token_of(edge));
  if (slot != nullptr) {
    slot->store(edge, std::memory_order_release);
    return table;
  }
  for (std::uint32_t size = size_of(table) * 2;; size *= 2) {
    const Table larger = allocate(size);
    const Slot* old = slots_.at(address_of(table));
    bool fits = true;
    const auto insert = [&](Edge moved) {
      Slot* place = place_for(larger, token_of(moved));
      fits = fits && place != nullptr;
      if (fits) place->store(moved, std::memory_order_relaxed);
    };
    for (std::uint32_t index = 0; index < size_of(table); ++index) {
      const Edge moved = old[index].load(std::memory_order_relaxed);
      if (moved != kNoEdge) insert(moved);
    }
    insert(edge);
    if (fits) return larger;
    retire(larger);
  }
}

EdgePool::Table EdgePool::copy(Table table) {
  if (table == 0) return 0;
  const Table copied = allocate(size_of(table));
  const Slot* from = slots_.at(address_of(table));
  Slot* to = slots_.at(address_of(copied));
  for (std::uint32_t index = 0; index < size_of(table); ++index) {
    to[index].store(from[index].load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
  return copied;
}

void EdgePool::retire(Table table) {
  if (table != 0) retired_.emplace_back(epochs_.now(), table);
}

EdgePool::Table EdgePool::allocate(std::uint32_t size) {
  reclaim();
  const int logarithm = 31 - __builtin_clz(size);
  std::uint32_t address = free_[logarithm];
  if (address != 0) {
    Slot* slots = slots_.at(address);
    free_[logarithm] = static_cast<std::uint32_t>(slots[0].load(std::memory_order_relaxed));
    for (std::uint32_t i = 0; i < size; ++i) slots[i].store(kNoEdge, std::memory_order_relaxed);
    return address + size / 2;
  }
  std::uint64_t at = (std::uint64_t{end_} + size - 1) / size * size;
  while (at + size < (std::uint64_t{1} << 32) &&
         GrowingArray<Slot>::segment_size(static_cast<std::uint32_t>(at)) < size) {
    at *= 2;  // a table lies in one segment: those that are too small stay unallocated
  }
  if (at + size >= (std::uint64_t{1} << 32)) {
    throw std::length_error("a suffix automaton holds at most 2**32 edges: start a new one");
  }
  address = static_cast<std::uint32_t>(at);
  slots_.allocate(address);
  end_ = address + size;
  return address + size / 2;
}

// The slot that holds `token` or could: nullptr if the table has no room near it.
EdgePool::Slot* EdgePool::place_for(Table table, Token token) const {
  const std::uint32_t size = size_of(table);
  Slot* slots = slots_.at(address_of(table));
  const std::uint32_t start = scatter(token);
  for (std::uint32_t probe = 0; probe < std::min(size, kMaxProbes); ++probe) {
    Slot* slot = slots + ((start + probe) & (size - 1));
    const Edge edge = slot->load(std::memory_order_acquire);
    if (edge == kNoEdge || token_of(edge) == token) return slot;
  }
  return nullptr;
}

void EdgePool::reclaim() {
  while (!retired_.empty() && epochs_.is_over(retired_.front().first)) {
    const Table table = retired_.front().second;
    retired_.pop_front();
    const int logarithm = 31 - __builtin_clz(size_of(table));
    slots_.at(address_of(table))->store(free_[logarithm], std::memory_order_relaxed);
    free_[logarithm] = address_of(table);
  }
}

}  // namespace paceline
