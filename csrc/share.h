// How work is shared among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace igpt {

// Calls work(i) for 0 <= i < count, on all threads of torch. They take one i after another, because pieces may differ widely
// in cost, and because a core may be busy elsewhere.
template <class Work>
void share(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

}  // namespace igpt
