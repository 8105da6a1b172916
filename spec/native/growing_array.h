// An array that grows without moving what it holds, so that readers need no lock.
//
// Elements lie in segments, four to each doubling of the array: at most a fifth of it is unused
// (beyond the first few), and an element's segment follows from its index by shifts.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace paceline {

// Budget of memory that is asked before an allocation. `take` throws where it is exhausted.
class Budget {
 public:
  virtual void take(std::size_t bytes) = 0;
  virtual void give(std::size_t bytes) = 0;

 protected:
  ~Budget() = default;
};

// Bytes taken from a budget (none: not counted), given back at the end.
class Lease {
 public:
  explicit Lease(Budget* budget, std::size_t bytes = 0) : budget_(budget) { grow(bytes); }
  ~Lease() { shrink(bytes_); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  void grow(std::size_t bytes) {
    if (budget_ != nullptr) budget_->take(bytes);
    bytes_ += bytes;
  }
  void shrink(std::size_t bytes) {
    if (budget_ != nullptr) budget_->give(bytes);
    bytes_ -= bytes;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  Budget* budget_;
  std::size_t bytes_ = 0;
};

// Addresses start at `kFirst`, not at 0, and a segment starts at a multiple of its size.
template <class Element>
class GrowingArray {
 public:
  static constexpr std::uint32_t kFirst = 64;

  explicit GrowingArray(Budget* budget) : lease_(budget) {}
  ~GrowingArray() {
    for (int index = 0; index < kSegments; ++index) delete[] segments_[index].load();
  }
  GrowingArray(const GrowingArray&) = delete;
  GrowingArray& operator=(const GrowingArray&) = delete;

  // The element at `address`, and behind it the rest of its segment.
  Element* at(std::uint32_t address) const {
    const Place place = place_of(address);
    return segments_[place.segment].load(std::memory_order_acquire) + place.offset;
  }

  // Makes the segment of `address` exist, zeroed. Writer only.
  void allocate(std::uint32_t address) {
    const Place place = place_of(address);
    if (segments_[place.segment].load(std::memory_order_relaxed) != nullptr) return;
    const std::size_t size = segment_size(address);
    lease_.grow(size * sizeof(Element));
    segments_[place.segment].store(new Element[size](), std::memory_order_release);
  }

  static std::uint32_t segment_size(std::uint32_t address) {
    return std::uint32_t{1} << (doubling_of(address) - kSegmentBits);
  }

  std::size_t bytes() const { return lease_.bytes(); }

 private:
  struct Place {
    int segment;
    std::uint32_t offset;
  };
  static constexpr int kFirstDoubling = 6;
  static constexpr int kSegmentBits = 2;
  static constexpr int kSegments = (32 - kFirstDoubling) << kSegmentBits;

  static int doubling_of(std::uint32_t address) { return 31 - __builtin_clz(address); }

  static Place place_of(std::uint32_t address) {
    const int shift = doubling_of(address) - kSegmentBits;
    const std::uint32_t quarter = (address >> shift) - (std::uint32_t{1} << kSegmentBits);
    const int segment = ((shift + kSegmentBits - kFirstDoubling) << kSegmentBits) +
                        static_cast<int>(quarter);
    return {segment, address & ((std::uint32_t{1} << shift) - 1)};
  }

  Lease lease_;
  std::atomic<Element*> segments_[kSegments] = {};
};

}  // namespace paceline
