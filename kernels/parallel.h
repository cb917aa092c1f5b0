// Threads for one call. Plain std::thread: a second OpenMP runtime beside torch's spins, and hangs after fork.
#pragma once
#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace counterlens {

constexpr int64_t kSerialBytes = int64_t(1) << 20;  // below this much output, starting a thread costs more than it saves

// Run body(begin, end) over [0, items) in `threads` contiguous parts; in this thread alone for small outputs.
template <typename Body>
void parallel_for(int64_t items, int64_t output_bytes, int threads, const Body &body) {
  const int64_t parts = output_bytes < kSerialBytes ? 1 : std::min<int64_t>(std::max(threads, 1), items);
  std::vector<std::thread> others;
  others.reserve(parts > 0 ? parts - 1 : 0);
  int64_t begin = parts > 0 ? items / parts : 0;  // the first part is this thread's own
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t end = items * (part + 1) / parts;
    try {
      others.emplace_back(body, begin, end);
    } catch (const std::system_error &) {
      break;  // the system has no thread left: this one does the rest
    }
    begin = end;
  }
  if (parts > 0) body(int64_t(0), items / parts);
  if (parts > 0 && begin < items) body(begin, items);
  for (auto &thread : others) thread.join();
}

}  // namespace counterlens
