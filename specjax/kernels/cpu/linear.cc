// y[m, n] = sum_k x[m, k] * w[n, k] for a few rows m: one pass over the weights, whatever m is.
//
// Each output is summed over k in sixteen lanes and then across them, in an order that depends on k
// alone. So a row's result does not depend on how many rows are computed with it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Index __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Vector Load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vector LoadPart(const float* p, int64_t count) {
  Vector v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

// Sums neighbouring lanes: those of a into the lower half, those of b into the upper half.
inline Vector AddPairs(Vector a, Vector b) {
  const Index even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const Index odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Sixteen vectors to the vector of their sums.
inline Vector AddAcross(Vector* v) {
  for (int n = kLanes / 2; n >= 1; n /= 2) {
    for (int i = 0; i < n; ++i) v[i] = AddPairs(v[2 * i], v[2 * i + 1]);
  }
  return v[0];
}

// `Rows` rows of x against `Columns` rows of w.
template <int Rows, int Columns>
inline void Tile(const float* x, const float* w, float* y, int64_t k, int64_t n) {
  constexpr int kSums = (Rows * Columns + kLanes - 1) / kLanes * kLanes;
  Vector sums[kSums] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Vector weights[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) weights[c] = Load(w + c * k + i);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) __builtin_prefetch(w + (2 * Columns + c) * k + i);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vector inputs = Load(x + r * k + i);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sums[r * Columns + c] += inputs * weights[c];
    }
  }
  if (i < k) {
    for (int r = 0; r < Rows; ++r) {
      const Vector inputs = LoadPart(x + r * k + i, k - i);
      for (int c = 0; c < Columns; ++c) {
        sums[r * Columns + c] += inputs * LoadPart(w + c * k + i, k - i);
      }
    }
  }
  float totals[kSums];
#pragma GCC unroll 4
  for (int j = 0; j < kSums; j += kLanes) {
    const Vector total = AddAcross(sums + j);
    std::memcpy(totals + j, &total, sizeof(total));
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Columns; ++c) y[r * n + c] = totals[r * Columns + c];
  }
}

template <int Columns>
inline void RowsOf(int64_t m, const float* x, const float* w, float* y, int64_t k, int64_t n) {
  while (m > 0) {
    const int64_t groups = (m + 5) / 6;
    const int64_t rows = (m + groups - 1) / groups;
    switch (rows) {
      case 1: Tile<1, Columns>(x, w, y, k, n); break;
      case 2: Tile<2, Columns>(x, w, y, k, n); break;
      case 3: Tile<3, Columns>(x, w, y, k, n); break;
      case 4: Tile<4, Columns>(x, w, y, k, n); break;
      case 5: Tile<5, Columns>(x, w, y, k, n); break;
      default: Tile<6, Columns>(x, w, y, k, n); break;
    }
    m -= rows;
    x += rows * k;
    y += rows * n;
  }
}

// Columns [begin, end) of y.
void Span(int64_t begin, int64_t end, int64_t m, const float* x, const float* w, float* y,
          int64_t k, int64_t n) {
  int64_t c = begin;
  if (m == 1) {
    for (; c + 8 <= end; c += 8) Tile<1, 8>(x, w + c * k, y + c, k, n);
  }
  for (; c + 4 <= end; c += 4) RowsOf<4>(m, x, w + c * k, y + c, k, n);
  for (; c < end; ++c) RowsOf<1>(m, x, w + c * k, y + c, k, n);
}

// Spans are claimed one by one by whoever is free. The caller claims too, and waits only for what
// others have begun, so it never waits for a thread that waits for it.
struct Work {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> finished{0};
};

constexpr int64_t kSpanBytes = 128 << 10;
constexpr int64_t kParallelBytes = 384 << 10;

ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                  ffi::ResultBuffer<ffi::F32> y) {
  const int64_t n = w.dimensions()[0], k = w.dimensions()[1];
  const int64_t m = k == 0 ? 0 : static_cast<int64_t>(x.element_count()) / k;
  const float *xs = x.typed_data(), *ws = w.typed_data();
  float* ys = y->typed_data();
  const int64_t bytes = n * k * static_cast<int64_t>(sizeof(float));
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), 16) - 1;
  if (bytes < kParallelBytes || helpers < 1) {
    Span(0, n, m, xs, ws, ys, k, n);
    return ffi::Error::Success();
  }
  const int64_t width = std::max<int64_t>(8, kSpanBytes / (k * 4) / 8 * 8);
  const int64_t spans = (n + width - 1) / width;
  auto work = std::make_shared<Work>();
  auto run = [=](Work& shared) {
    for (int64_t i; (i = shared.next.fetch_add(1)) < spans;) {
      Span(i * width, std::min(n, (i + 1) * width), m, xs, ws, ys, k, n);
      shared.finished.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < std::min(helpers, spans - 1); ++i) {
    pool.Schedule([work, run] { run(*work); });
  }
  run(*work);
  while (work->finished.load(std::memory_order_acquire) < spans) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxLinear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
