// The weight of all entries that come before each one, in ascending order of their keys.
//
// Keys are floats of at least 0, whose bits order as integers do; a stable radix sort of three
// passes leaves equal keys in the order of their ids.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

struct Item {
  uint32_t key;
  uint32_t id;
};

constexpr int kShifts[] = {0, 11, 21}, kDigits = 3, kMostValues = 1 << 11;

inline uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}

inline uint32_t Digit(uint32_t key, int pass) {
  return (key >> kShifts[pass]) & (pass == 0 ? 0x7ff : 0x3ff);
}

// Entries of key 0 and of the highest key, of which there may be many, are in order already.
void Row(const float* keys, const float* weights, float* below, int64_t n) {
  thread_local std::vector<uint32_t> ids;
  thread_local std::vector<Item> both;
  ids.resize(2 * n);
  both.resize(2 * n);
  uint32_t *first = ids.data(), *last = first + n;
  Item *items = both.data(), *sorted = items + n;
  uint32_t highest = 1;
  for (int64_t i = 0; i < n; ++i) highest = std::max(highest, Bits(keys[i]));
  int64_t count = 0, num_first = 0, num_last = 0;
  for (int64_t i = 0; i < n; ++i) {  // no branch: nobody could predict it
    const uint32_t key = Bits(keys[i]), id = static_cast<uint32_t>(i);
    first[num_first] = last[num_last] = id;
    items[count] = {key, id};
    num_first += key == 0;
    num_last += key == highest;
    count += (key != 0) & (key != highest);
  }
  uint32_t starts[kDigits][kMostValues] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int pass = 0; pass < kDigits; ++pass) ++starts[pass][Digit(items[i].key, pass)];
  }
  for (int pass = 0; pass < kDigits; ++pass) {
    uint32_t before = 0;
    for (uint32_t& start : starts[pass]) before += std::exchange(start, before);
    for (int64_t i = 0; i < count; ++i) {
      sorted[starts[pass][Digit(items[i].key, pass)]++] = items[i];
    }
    std::swap(items, sorted);
  }
  double sum = 0;
  const auto visit = [&](uint32_t id) {
    below[id] = static_cast<float>(sum);
    sum += weights[id];
  };
  for (int64_t i = 0; i < num_first; ++i) visit(first[i]);
  for (int64_t i = 0; i < count; ++i) visit(items[i].id);
  for (int64_t i = 0; i < num_last; ++i) visit(last[i]);
}

ffi::Error Below(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> weights,
                 ffi::ResultBuffer<ffi::F32> result) {
  const int64_t rows = keys.dimensions()[0], n = keys.dimensions()[1];
  Team::For(pool.num_threads(), rows, [&](int64_t row) {
    const int64_t at = row * n;
    Row(keys.typed_data() + at, weights.typed_data() + at, result->typed_data() + at, n);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxBelow, specjax::Below,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
