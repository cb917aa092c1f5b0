// The consensus filter on one sample, shared by the operations that need it. Follows reference.py line by line.
#pragma once
#include <cstdint>
#include <vector>

namespace counterlens {

enum class FilterMode : int { zero = 0, project = 1, global = 2, off = 3 };

// score, reference, filtered: [c, h, w], contiguous and apart from each other; kept: [h/chunk, w/chunk].
// scratch grows to what is needed and is there to be used again.
template <typename T>
void filter_sample(const T *score, const T *reference, T cos_limit, T tan_limit, T *filtered, uint8_t *kept, int64_t c,
                   int64_t h, int64_t w, int64_t chunk, FilterMode mode, std::vector<T> &scratch);

}  // namespace counterlens
