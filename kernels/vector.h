// Sums and extremes over one long vector, in lanes that the compiler can keep in vector registers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

namespace counterlens {

constexpr int64_t kLanes = 32;
constexpr uintptr_t kCacheLine = 64;

// Uninitialised memory that starts on a cache line. torch's tensors do so too: then a load never overlaps, in the low 12
// bits of the address, a store to another array just before it, which the processor would mistake for the same place and
// wait for.
template <typename T>
class Aligned {
  std::unique_ptr<T[]> memory;
  T *start;

 public:
  explicit Aligned(int64_t n) : memory(new T[n + kCacheLine / sizeof(T)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    start = memory.get() + (-address % kCacheLine) / sizeof(T);
  }
  T *data() const { return start; }
};

template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// The bits of |value|. Read as integers they are in the order of the magnitudes, with inf above every number and NaN
// above inf: so the largest magnitude is an integer maximum, and NaN wins over everything, as in torch.amax.
template <typename T>
inline BitsOf<T> magnitude_bits(T value) {
  BitsOf<T> bits;
  std::memcpy(&bits, &value, sizeof(T));
  return bits & std::numeric_limits<BitsOf<T>>::max();
}

// The bits of the largest magnitude.
template <typename T>
BitsOf<T> largest_magnitude(const T *v, int64_t n) {
  BitsOf<T> lane[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lane[j] = std::max(lane[j], magnitude_bits(v[i + j]));
  BitsOf<T> largest = 0;
  for (int64_t i = whole; i < n; ++i) largest = std::max(largest, magnitude_bits(v[i]));
  for (int64_t j = 0; j < kLanes; ++j) largest = std::max(largest, lane[j]);
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

// The power of two that brings a number with these magnitude bits into [1, 4) (0 stays 0), so that squares neither
// overflow nor vanish. Exact where a division would round, and a multiplication is many times cheaper. NaN and inf get
// some power, and stay what they are.
template <typename T>
inline T power_scale(BitsOf<T> largest) {
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr BitsOf<T> exponents = (sizeof(T) == 4 ? BitsOf<T>(0xff) : BitsOf<T>(0x7ff)) << mantissa;
  constexpr BitsOf<T> one = BitsOf<T>(1) << mantissa;
  const BitsOf<T> bits = std::max<BitsOf<T>>(exponents - one - (largest & exponents), one);
  T scale;
  std::memcpy(&scale, &bits, sizeof(T));
  return scale;
}

// Sum of the squares of v * scale.
template <typename T>
T scaled_squares(const T *v, int64_t n, T scale) {
  return lane_sum<T>(n, [=](int64_t i) {
    const T unit = v[i] * scale;
    return unit * unit;
  });
}

// The norm that belongs to a sum of squares. NaN where that is inf: a vector with an inf in it has no direction.
template <typename T>
T root(T squares) {
  return std::isinf(squares) ? std::numeric_limits<T>::quiet_NaN() : std::sqrt(squares);
}

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// Sum of r^i / i! for i from k to `last`, over r^k.
template <int last, int k = 0, typename T>
inline T exponential_series(T r) {
  constexpr T term = T(inverse_factorial(k));
  if constexpr (k == last)
    return term;
  else
    return term + r * exponential_series<last, k + 1>(r);
}

// exp(x) to 2 units in the last place, in operations that the compiler can keep in vector registers (std::exp is a call).
// Subnormal results, overflow to inf, exp(-inf) = 0 and NaN as in std::exp.
template <typename T>
inline T exponential(T x) {
  constexpr bool single = sizeof(T) == 4;
  using Word = std::conditional_t<single, uint32_t, uint64_t>;
  constexpr int mantissa = single ? 23 : 52;
  constexpr Word bias = single ? 127 : 1023;
  constexpr T round = T(single ? 12582912.0 : 6755399441055744.0);  // 1.5 * 2^mantissa: adding it leaves whole numbers
  constexpr T lowest = T(single ? -104 : -746), highest = T(single ? 89 : 710);  // beyond: 0 and inf
  constexpr T log2_e = T(1.4426950408889634);
  // ln 2 in two parts; whole numbers of a dozen bits times the first are exact.
  constexpr T ln_2 = T(single ? 0.693359375 : 0.693147180369123816490);
  constexpr T ln_2_rest = T(single ? -2.12194440054690582e-4 : 1.90821492927058770002e-10);
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const T shifted = x * log2_e + round, whole = shifted - round;
  const T r = (x - whole * ln_2) - whole * ln_2_rest;  // exp(x) = 2^whole * exp(r), |r| <= ln(2) / 2
  // 2^whole in two factors, each with an exponent in range: what underflows is rounded once, by the last product.
  Word bits, zero;
  std::memcpy(&bits, &shifted, sizeof(T));
  std::memcpy(&zero, &round, sizeof(T));
  const Word exponent = bits - zero + 2 * bias;
  const Word factors[2] = {(exponent / 2) << mantissa, (exponent - exponent / 2) << mantissa};
  T first, second;
  std::memcpy(&first, &factors[0], sizeof(T));
  std::memcpy(&second, &factors[1], sizeof(T));
  return exponential_series<single ? 7 : 13>(r) * first * second;
}

// The largest value; NaN wins over everything, as in torch.amax.
template <typename T>
T largest_value(const T *v, int64_t n) {
  const auto larger = [](T largest, T value) { return (value > largest) | (value != value) ? value : largest; };
  T lane[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) lane[j] = -std::numeric_limits<T>::infinity();
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lane[j] = larger(lane[j], v[i + j]);
  T largest = -std::numeric_limits<T>::infinity();
  for (int64_t i = whole; i < n; ++i) largest = larger(largest, v[i]);
  for (int64_t j = 0; j < kLanes; ++j) largest = larger(largest, lane[j]);
  return largest;
}

}  // namespace counterlens
