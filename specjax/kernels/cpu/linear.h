// Products of a few rows with one or several matrices: one pass over the weights, whatever m is.
//
//     y_j = norm(x) w_j^T + residual    or, gated,    y = act(norm(x) w_0^T) * (norm(x) w_1^T)
//
// A row's result depends on no other row and not on how many there are.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"
#include "tiles.h"
#include "vector.h"

namespace specjax {

template <class Weight>
struct Matrix {
  const Weight* weights;  // [n, k]
  const float* scales;    // [n], or null
  int64_t n;
  float* y;  // [m, n]; null for the second of a gated pair
};

template <class Weight>
struct Linear {
  int64_t m, k;
  const float* x;         // [m, k]
  const float* gains;     // [k] of an RMSNorm before the product, or null
  float eps;              // its own
  const float* residual;  // [m, n] added to the only y, or null
  bool gated, gelu;       // gated by GELU, or else by SiLU
  std::vector<Matrix<Weight>> matrices;  // two if gated
};

// Columns of a matrix that a thread claims at once: as many for each thread, in spans of about
// kSpan bytes of weights, so that none has to wait long for another; but not so few that claiming
// takes longer than the product.
constexpr int64_t kLeastSpan = 16 << 10, kSpan = 256 << 10;
constexpr int64_t kColumns = 32;  // multiplied at once; a span is a multiple of these

// 1 / sqrt(mean(x^2) + eps) of each row.
inline void Factors(int64_t m, int64_t k, const float* x, float eps, float* factors) {
  for (int64_t r = 0; r < m; ++r, x += k) {
    Vector sum = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) sum += Load(x + i) * Load(x + i);
    if (i < k) sum += LoadPart(x + i, k - i) * LoadPart(x + i, k - i);
    factors[r] = 1 / std::sqrt(AddAcross<1>(&sum)[0] / k + eps);
  }
}

inline void Normalize(int64_t k, const float* x, float factor, const float* gains, float* y) {
  for (int64_t i = 0; i < k; ++i) y[i] = x[i] * factor * gains[i];
}

// What follows a product, in the columns [begin, begin + width) of y; `up` is [m, kColumns].
template <class Weight>
inline void Finish(const Linear<Weight>& f, const Matrix<Weight>& matrix, int64_t begin,
                   int64_t width, const float* up) {
  for (int64_t r = 0; r < f.m; ++r) {
    float* y = matrix.y + r * matrix.n + begin;
    const float* residual = f.residual ? f.residual + r * matrix.n + begin : nullptr;
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, width - c);
      auto load = [&](const float* p) { return count == kLanes ? Load(p) : LoadPart(p, count); };
      Vector v = load(y + c);
      if (matrix.scales) v *= load(matrix.scales + begin + c);
      if (f.gated) {
        Vector u = load(up + r * kColumns + c);
        if (f.matrices[1].scales) u *= load(f.matrices[1].scales + begin + c);
        v = (f.gelu ? Gelu(v) : Silu(v)) * u;
      }
      if (residual) v += load(residual + c);
      if (count == kLanes) {
        Store(y + c, v);
      } else {
        std::memcpy(y + c, &v, count * sizeof(float));
      }
    }
  }
}

#if defined(SPECJAX_TILES)
// The rows of one call, packed by each thread for itself: fetching them from another's cache would
// take longer.
class PackedRows {
 public:
  template <class Weight>
  static const BFloat16* Of(const Linear<Weight>& f, uint64_t call) {
    thread_local PackedRows own;
    BFloat16* packed = own.memory_.Of(PackedSize(f.m, f.k));
    if (own.call_ != call) {
      own.call_ = call;
      own.factors_.resize(f.m);
      if (f.gains) Factors(f.m, f.k, f.x, f.eps, own.factors_.data());
      Pack(f.m, f.x, f.k, own.factors_.data(), f.gains, packed);
    }
    return packed;
  }

 private:
  uint64_t call_ = 0;
  std::vector<float> factors_;
  Scratch<BFloat16> memory_;
};

// The same product on tiles. They make a NaN of infinities too, whose parts cancel: what is one is
// computed again without them.
template <class Weight>
void OnTiles(const Linear<Weight>& f, uint64_t call, int64_t columns, const Weight* w,
             const Weight* next, float* y, int64_t n) {
  if (!ProductOfPacked(f.m, columns, PackedRows::Of(f, call), w, next, y, f.k, n)) return;
  std::vector<float> row(f.k);
  for (int64_t r = 0; r < f.m; ++r) {
    const float* x = f.x + r * f.k;
    if (f.gains) {
      float factor;
      Factors(1, f.k, x, f.eps, &factor);
      Normalize(f.k, x, factor, f.gains, row.data());
      x = row.data();
    }
    for (int64_t c = 0; c < columns; ++c) {
      float& sum = y[r * n + c];
      if (std::isnan(sum)) Product(1, 1, x, w + c * f.k, &sum, f.k, n);
    }
  }
}
#endif

template <class Weight>
void Run(int64_t threads, const Linear<Weight>& f) {
  const int64_t m = f.m, k = f.k;
  bool on_tiles = false;
#if defined(SPECJAX_TILES)
  static std::atomic<uint64_t> calls{0};
  const uint64_t call = ++calls;
  on_tiles = sizeof(Weight) < sizeof(float) && TilesAllowed();
#endif
  const float* x = f.x;
  if (!on_tiles && f.gains) {
    thread_local std::vector<float> factors, rows;
    factors.resize(m);
    rows.resize(m * k);
    Factors(m, k, x, f.eps, factors.data());
    for (int64_t r = 0; r < m; ++r) {
      Normalize(k, x + r * k, factors[r], f.gains, rows.data() + r * k);
    }
    x = rows.data();
  }
  // Of `columns` up to kColumns; `next` are the weights this thread needs after w, or null.
  auto product = [&](int64_t columns, const Weight* w, const Weight* next, float* y, int64_t n) {
#if defined(SPECJAX_TILES)
    if constexpr (sizeof(Weight) < sizeof(float)) {
      if (on_tiles) return OnTiles(f, call, columns, w, next, y, n);
    }
#endif
    Product(m, columns, x, w, y, k, n);
  };

  struct Span {
    int64_t matrix, begin, width;
  };
  thread_local std::vector<Span> spans;
  spans.clear();
  const int64_t own = f.gated ? 1 : f.matrices.size();
  for (int64_t j = 0; j < own; ++j) {
    const int64_t n = f.matrices[j].n, bytes = std::max<int64_t>(1, k * sizeof(Weight));
    const int64_t count = threads * std::max<int64_t>(1, n * bytes / (threads * kSpan));
    const int64_t share = std::max<int64_t>({(n + count - 1) / count, kLeastSpan / bytes, 1});
    const int64_t width = (share + kColumns - 1) / kColumns * kColumns;
    for (int64_t c = 0; c < n; c += width) spans.push_back({j, c, std::min(width, n - c)});
  }
  const Span* all = spans.data();
  Team::For(threads, spans.size(), [&](int64_t i) {
    const auto [j, begin, width] = all[i];
    const Matrix<Weight>& matrix = f.matrices[j];
#if defined(SPECJAX_TILES)
    const TilesInUse tiles(on_tiles);
#endif
    thread_local std::vector<float> up;
    up.resize(f.gated ? m * kColumns : 0);
    for (int64_t c = begin; c < begin + width; c += kColumns) {
      const int64_t columns = std::min(kColumns, begin + width - c);
      const Weight *w = matrix.weights + c * k, *next = w + kColumns * k;
      if (c + 2 * kColumns > begin + width) next = nullptr;
      if (f.gated) {
        const Weight* other = f.matrices[1].weights + c * k;
        product(columns, w, columns == kColumns ? other : nullptr, matrix.y + c, matrix.n);
        product(columns, other, next, up.data(), kColumns);
      } else {
        product(columns, w, next, matrix.y + c, matrix.n);
      }
      if (f.gated || f.residual || matrix.scales) Finish(f, matrix, c, columns, up.data());
    }
  });
}

}  // namespace specjax
