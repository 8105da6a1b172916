// The noise of coupled sampling, bit for bit that of `spec/noise.py`, which says what it is for.

#pragma once

#include <cmath>
#include <cstdint>

namespace paceline {

// Number `index` of the stream that SplitMix64 makes from a state.
inline std::uint64_t draw(std::uint64_t stream, std::uint64_t index) {
  std::uint64_t bits = stream + (index + 1) * 0x9E3779B97F4A7C15U;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9U;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBU;
  return bits ^ (bits >> 31);
}

// Random bits as a number with the standard Gumbel distribution.
inline double gumbel(std::uint64_t bits) {
  const double uniform = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
  return -std::log(-std::log(uniform));
}

}  // namespace paceline
