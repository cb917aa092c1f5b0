// Sums and extremes over one long vector, in lanes that the compiler can keep in vector registers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace counterlens {

constexpr int64_t kLanes = 32;

// The larger magnitude; NaN wins over everything, as in torch.amax.
template <typename T>
inline T larger(T largest, T value) {
  const T a = std::fabs(value);
  return (a > largest) | (a != a) ? a : largest;
}

template <typename T>
T largest_magnitude(const T *v, int64_t n) {
  T lane[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lane[j] = larger(lane[j], v[i + j]);
  T largest = 0;
  for (int64_t i = whole; i < n; ++i) largest = larger(largest, v[i]);
  for (int64_t j = 0; j < kLanes; ++j) largest = larger(largest, lane[j]);
  return largest;
}

// Sum of term(i) for i in [0, n).
template <typename T, typename Term>
inline T lane_sum(int64_t n, const Term &term) {
  T lane[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += term(i + j);
  T sum = 0;
  for (int64_t i = whole; i < n; ++i) sum += term(i);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
  return sum + lane[0];
}

template <typename T>
T dot(const T *a, const T *b, int64_t n) {
  return lane_sum<T>(n, [=](int64_t i) { return a[i] * b[i]; });
}

// The power of two that brings `largest` into [1, 4) (0 stays 0), so that squares neither overflow nor vanish. Exact where
// a division would round, and a multiplication is many times cheaper. NaN and inf get some power, and stay what they are.
template <typename T>
inline T power_scale(T largest) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr Bits exponents = (sizeof(T) == 4 ? Bits(0xff) : Bits(0x7ff)) << mantissa, one = Bits(1) << mantissa;
  Bits bits;
  std::memcpy(&bits, &largest, sizeof(T));
  bits = exponents - one - (bits & exponents);
  bits = bits < one ? one : bits;
  T scale;
  std::memcpy(&scale, &bits, sizeof(T));
  return scale;
}

// Norm of v * scale, with v's `power_scale`. NaN where v holds an inf: such a vector has no direction.
template <typename T>
T scaled_norm(const T *v, int64_t n, T scale) {
  const T square = lane_sum<T>(n, [=](int64_t i) {
    const T unit = v[i] * scale;
    return unit * unit;
  });
  return std::isinf(square) ? std::numeric_limits<T>::quiet_NaN() : std::sqrt(square);
}

}  // namespace counterlens
