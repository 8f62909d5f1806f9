// The k largest of rows over a vocabulary.

#ifndef SPECJAX_KERNELS_CPU_VOCABULARY_H_
#define SPECJAX_KERNELS_CPU_VOCABULARY_H_

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "threads.h"
#include "vector.h"

namespace specjax {
namespace {

constexpr int64_t kStretch = 8 * kLanes;  // numbers compared at once with the least of the k largest
constexpr float kNothing = -std::numeric_limits<float>::infinity();

inline bool Any(const Index& is) {
  int64_t words[sizeof(Index) / sizeof(int64_t)], any = 0;
  std::memcpy(words, &is, sizeof(is));
  for (int64_t word : words) any |= word;
  return any != 0;
}

// The ids of the k largest numbers of each row, the largest first, of equals the lowest id first.
// NaN counts as the least of numbers.
inline void LargestIds(int64_t threads, int64_t rows, int64_t size, int64_t k, const float* x,
                       int32_t* ids) {
  Team::For(threads, rows, [&](int64_t row) {
    const float* xs = x + row * size;
    int32_t* found = ids + row * k;
    std::vector<float> top(k);
    // Puts a number behind those that are no less; the one at `place` goes.
    auto insert = [&](int64_t id, float number, int64_t place) {
      for (; place > 0 && top[place - 1] < number; --place) {
        top[place] = top[place - 1];
        found[place] = found[place - 1];
      }
      top[place] = number;
      found[place] = static_cast<int32_t>(id);
    };
    for (int64_t i = 0; i < k; ++i) insert(i, xs[i] != xs[i] ? kNothing : xs[i], i);
    auto compare = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (xs[i] > top[k - 1]) insert(i, xs[i], k - 1);
      }
    };
    int64_t i = k;
    for (; i + kStretch <= size; i += kStretch) {
      Vector peak = Vector{} + kNothing;
      for (int64_t j = 0; j < kStretch; j += kLanes) {
        const Vector next = Load(xs + i + j);
        peak = next > peak ? next : peak;
      }
      if (Any(peak > top[k - 1])) compare(i, i + kStretch);
    }
    compare(i, size);
  });
}

}  // namespace
}  // namespace specjax

#endif  // SPECJAX_KERNELS_CPU_VOCABULARY_H_
