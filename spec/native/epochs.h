// Memory that lock-free readers may still read: freed once none can (epoch-based reclamation,
// Fraser 2004).
//
// A reader enters an epoch before it follows a pointer that a writer may replace, and leaves it
// after the last access. Memory that was retired in epoch e can be freed once the epoch is e + 2:
// an epoch ends only when all readers that entered the one before have left. Readers never wait.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

namespace paceline {

class Epochs {
 public:
  // Held by a reader for as long as it follows pointers. Many threads may hold one each.
  class Guard {
   public:
    explicit Guard(const Epochs& epochs) : epochs_(epochs) {
      while (true) {
        entered_ = epochs_.epoch_.load();
        epochs_.readers_[entered_ & 1].inside.fetch_add(1);
        if (epochs_.epoch_.load() == entered_) return;
        epochs_.readers_[entered_ & 1].inside.fetch_sub(1);  // the epoch ended meanwhile
      }
    }
    ~Guard() { epochs_.readers_[entered_ & 1].inside.fetch_sub(1); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    const Epochs& epochs_;
    std::uint64_t entered_;
  };

  // The rest is for one writer at a time.

  std::uint64_t now() const { return epoch_.load(); }

  // Whether no reader can access any more what was retired in epoch `retired`. Never waits.
  bool is_over(std::uint64_t retired) {
    while (now() < retired + 2 && advance()) {
    }
    return now() >= retired + 2;
  }

  // Calls `free` once no reader can access any more what was just retired.
  void retire(std::function<void()> free) { retired_.emplace_back(now(), std::move(free)); }

  // Frees what can be freed. Never waits.
  void collect() {
    std::size_t freed = 0;
    while (freed < retired_.size() && is_over(retired_[freed].first)) retired_[freed++].second();
    retired_.erase(retired_.begin(), retired_.begin() + static_cast<std::ptrdiff_t>(freed));
  }

  // Frees everything retired; waits for the readers of now.
  void wait() {
    while (!retired_.empty()) {
      collect();
      if (!retired_.empty()) std::this_thread::yield();
    }
  }

 private:
  struct alignas(64) Count {
    std::atomic<std::int64_t> inside{0};
  };

  bool advance() {
    const std::uint64_t epoch = epoch_.load();
    if (readers_[(epoch + 1) & 1].inside.load() != 0) return false;  // of the epoch before this one
    epoch_.store(epoch + 1);
    return true;
  }

  std::atomic<std::uint64_t> epoch_{0};
  mutable Count readers_[2];
  std::vector<std::pair<std::uint64_t, std::function<void()>>> retired_;
};

}  // namespace paceline
