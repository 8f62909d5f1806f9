// Gumbel noise from Threefry-2x32 counters, the same bits as jax.random.gumbel draws.

#include <array>
#include <cstdint>
#include <limits>

#include "threads.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

constexpr int64_t kSpan = 2048;  // numbers drawn at once by a thread

// Encrypts the counters (0, low) and mixes both words of each result.
inline Words Bits(uint32_t key0, uint32_t key1, Words low) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
  Words high = {};
  high += keys[0];
  low += keys[1];
#pragma GCC unroll 5
  for (int group = 0; group < 5; ++group) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int r = kRotations[group % 2][i];
      high += low;
      low = (low << r) | (low >> (32 - r));
      low ^= high;
    }
    high += keys[(group + 1) % 3];
    low += keys[(group + 2) % 3] + static_cast<uint32_t>(group + 1);
  }
  return high ^ low;
}

inline Vector Noise(Words bits) {
  bits = (bits >> 9) | 0x3f800000u;
  Vector uniform;
  std::memcpy(&uniform, &bits, sizeof(bits));
  uniform -= 1.0f;
  constexpr float kTiny = std::numeric_limits<float>::min();
  uniform = uniform > kTiny ? uniform : kTiny + Vector{};
  return -Log(-Log(uniform));
}

ffi::Error Gumbel(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> keys,
                  ffi::ResultBuffer<ffi::F32> result) {
  const int64_t rows = keys.dimensions()[0], n = result->dimensions()[1];
  const int64_t spans = (n + kSpan - 1) / kSpan;
  Team::For(pool.num_threads(), rows * spans, [&](int64_t item) {
    const int64_t row = item / spans, begin = item % spans * kSpan;
    const uint32_t* key = keys.typed_data() + 2 * row;
    float* out = result->typed_data() + row * n;
    Words counter;
    for (int i = 0; i < kLanes; ++i) counter[i] = begin + i;
    const int64_t end = std::min(n, begin + kSpan);
    for (int64_t i = begin; i < end; i += kLanes, counter += kLanes) {
      const Vector noise = Noise(Bits(key[0], key[1], counter));
      std::memcpy(out + i, &noise, std::min<int64_t>(kLanes, end - i) * sizeof(float));
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxGumbel, specjax::Gumbel,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
