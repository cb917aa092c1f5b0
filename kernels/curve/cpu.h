#pragma once
#include <cstdint>

namespace counterlens {

// logits: [n, 2, k, classes], targets: [n], thresholds: [n, k]; probability: [n, 2, k], insertion, deletion: [n].
template <typename T>
void curve_scores(const T *logits, const int64_t *targets, const T *thresholds, T *probability, T *insertion,
                  T *deletion, int64_t n, int64_t k, int64_t classes, int threads);

}  // namespace counterlens
