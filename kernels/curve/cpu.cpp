// Scores of perturbation curves on the CPU. Follows reference.py; see README.md for the edge cases.
#include "curve/cpu.h"

#include "parallel.h"
#include "vector.h"

namespace counterlens {
namespace {

// Softmax at the target. Infinite logits share the probability; NaN stays.
template <typename T>
T target_probability(const T *logits, int64_t classes, int64_t target) {
  const T largest = largest_value(logits, classes);
  const auto weight = [=](T x) { return x == largest ? T(1) : exponential(x - largest); };
  const T total = lane_sum<T>(classes, [=](int64_t i) { return weight(logits[i]); });
  return weight(logits[target]) / total;
}

// Half the first value and half the curve's mean by the trapezoid rule.
template <typename T>
T mean_under_curve(const T *values, const T *thresholds, int64_t k) {
  if (k == 1) return values[0];
  T area = 0;
  for (int64_t i = 1; i < k; ++i) area += (thresholds[i] - thresholds[i - 1]) * (values[i] + values[i - 1]) / 2;
  return (values[0] + area / (thresholds[k - 1] - thresholds[0])) / 2;
}

}  // namespace

template <typename T>
void curve_scores(const T *logits, const int64_t *targets, const T *thresholds, T *probability, T *insertion,
                  T *deletion, int64_t n, int64_t k, int64_t classes, int threads) {
  const int64_t input_bytes = n * 2 * k * classes * int64_t(sizeof(T));  // the output is small, the reading is the work
  parallel_for(n, input_bytes, threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T *p = probability + i * 2 * k;
      for (int64_t row = 0; row < 2 * k; ++row)
        p[row] = target_probability(logits + (i * 2 * k + row) * classes, classes, targets[i]);
      insertion[i] = mean_under_curve(p, thresholds + i * k, k);
      deletion[i] = mean_under_curve(p + k, thresholds + i * k, k);
    }
  });
}

template void curve_scores<float>(const float *, const int64_t *, const float *, float *, float *, float *, int64_t,
                                  int64_t, int64_t, int);
template void curve_scores<double>(const double *, const int64_t *, const double *, double *, double *, double *,
                                   int64_t, int64_t, int64_t, int);

}  // namespace counterlens
