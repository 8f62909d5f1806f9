// Rotary softmax attention of a few rows over [prefix | block], reading only the history there is.
//
// A row's result does not depend on the rows computed with it.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "threads.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

constexpr int kMaxRows = 6, kMaxVectors = 4;

// out[r, 0 : 16 Vectors] += sum_s weights[r, s] values[s, 0 : 16 Vectors].
template <int Rows, int Vectors>
inline void Mix(int64_t s, const float* weights, int64_t stride, const float* values, int64_t h,
                float* out) {
  Vector sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Load(out + r * h + v * kLanes);
  }
  for (int64_t i = 0; i < s; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const Vector value = Held(Load(values + i * h + v * kLanes));
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sums[r][v] += weights[r * stride + i] * value;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) Store(out + r * h + v * kLanes, sums[r][v]);
  }
}

// The same for all h columns.
template <int Rows>
inline void MixRows(int64_t s, const float* weights, int64_t stride, const float* values,
                    int64_t h, float* out) {
  int64_t j = 0;
  for (; j + kMaxVectors * kLanes <= h; j += kMaxVectors * kLanes) {
    Mix<Rows, kMaxVectors>(s, weights, stride, values + j, h, out + j);
  }
  for (; j + kLanes <= h; j += kLanes) {
    Mix<Rows, 1>(s, weights, stride, values + j, h, out + j);
  }
  for (; j < h; ++j) {
    for (int r = 0; r < Rows; ++r) {
      float sum = out[r * h + j];
      for (int64_t i = 0; i < s; ++i) sum += weights[r * stride + i] * values[i * h + j];
      out[r * h + j] = sum;
    }
  }
}

void MixAll(int64_t m, int64_t s, const float* weights, int64_t stride, const float* values,
            int64_t h, float* out) {
  while (m > 0) {
    const int64_t groups = (m + kMaxRows - 1) / kMaxRows;
    const int64_t rows = (m + groups - 1) / groups;
    switch (rows) {
      case 1: MixRows<1>(s, weights, stride, values, h, out); break;
      case 2: MixRows<2>(s, weights, stride, values, h, out); break;
      case 3: MixRows<3>(s, weights, stride, values, h, out); break;
      case 4: MixRows<4>(s, weights, stride, values, h, out); break;
      case 5: MixRows<5>(s, weights, stride, values, h, out); break;
      default: MixRows<6>(s, weights, stride, values, h, out); break;
    }
    m -= rows;
    weights += rows * stride;
    out += rows * h;
  }
}

// Scores to unnormalised weights, in place; `width` is a multiple of kLanes. Returns their sum.
inline float Softmax(float* scores, int64_t width) {
  Vector top = Load(scores);
  for (int64_t i = kLanes; i < width; i += kLanes) {
    const Vector x = Load(scores + i);
    top = x > top ? x : top;
  }
  float peak = top[0];
  for (int i = 1; i < kLanes; ++i) peak = std::max(peak, top[i]);
  Vector sum = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vector y = Exp(Load(scores + i) - peak);
    Store(scores + i, y);
    sum += y;
  }
  return AddAcross<1>(&sum)[0];
}

// Rotates halves against each other, times `scale`.
inline void Rotate(const float* x, const float* cos, const float* sin, int64_t h, float scale,
                   float* y) {
  const int64_t half = h / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[half + j];
    y[j] = (a * cos[j] - b * sin[j]) * scale;
    y[half + j] = (b * cos[j] + a * sin[j]) * scale;
  }
}

using F32 = ffi::Buffer<ffi::F32>;

ffi::Error Attention(ffi::ThreadPool pool, F32 queries, F32 keys, F32 values, F32 cos, F32 sin,
                     ffi::Buffer<ffi::PRED> mask, F32 prefix_keys, F32 prefix_values,
                     ffi::Buffer<ffi::S32> prefix_length, F32 block_keys, F32 block_values,
                     ffi::ResultBuffer<ffi::F32> mixed, ffi::ResultBuffer<ffi::F32> all_keys,
                     ffi::ResultBuffer<ffi::F32> all_values) {
  const auto shape = keys.dimensions();  // [B, N, K, H]
  const int64_t n = shape[1], kv = shape[2], h = shape[3], g = queries.dimensions()[2] / kv;
  const int64_t s = prefix_keys.dimensions()[2], m = mask.dimensions()[2], earlier = m - n;
  const int64_t rows = n * g;
  const float scale = 1 / std::sqrt(static_cast<float>(h));
  constexpr float kNothing = -std::numeric_limits<float>::infinity();

  Team::For(pool, shape[0] * kv, [&](int64_t item) {
    const int64_t b = item / kv, head = item % kv;

    // The block: earlier nodes, then the new ones.
    float* to_keys = all_keys->typed_data() + item * m * h;
    float* to_values = all_values->typed_data() + item * m * h;
    std::copy_n(block_keys.typed_data() + item * earlier * h, earlier * h, to_keys);
    std::copy_n(block_values.typed_data() + item * earlier * h, earlier * h, to_values);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = ((b * n + i) * kv + head) * h, angle = (b * n + i) * (h / 2);
      Rotate(keys.typed_data() + from, cos.typed_data() + angle, sin.typed_data() + angle, h, 1,
             to_keys + (earlier + i) * h);
      std::copy_n(values.typed_data() + from, h, to_values + (earlier + i) * h);
    }

    const int64_t length =
        std::min<int64_t>(s, std::max<int64_t>(0, prefix_length.typed_data()[b]));
    const int64_t width = (length + m + kLanes - 1) / kLanes * kLanes;
    thread_local std::vector<float> scratch;
    scratch.resize(rows * (width + 2 * h + 1));
    float* scores = scratch.data();  // [rows, width]: the prefix, the block, nothing
    float* q = scores + rows * width;
    float* out = q + rows * h;
    float* totals = out + rows * h;
    auto place = [&](int64_t r) {  // of row r of this head in queries and mixed
      return (((b * n + r / g) * kv + head) * g + r % g) * h;
    };
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t angle = (b * n + r / g) * (h / 2);
      Rotate(queries.typed_data() + place(r), cos.typed_data() + angle, sin.typed_data() + angle,
             h, scale, q + r * h);
    }
    Product(rows, length, q, prefix_keys.typed_data() + item * s * h, scores, h, width);
    Product(rows, m, q, to_keys, scores + length, h, width);
    for (int64_t r = 0; r < rows; ++r) {
      const bool* seen = mask.typed_data() + (b * n + r / g) * m;
      float* of_row = scores + r * width;
      for (int64_t j = 0; j < m; ++j) {
        if (!seen[j]) of_row[length + j] = kNothing;
      }
      std::fill(of_row + length + m, of_row + width, kNothing);
      totals[r] = Softmax(of_row, width);
    }
    std::fill_n(out, rows * h, 0.0f);
    MixAll(rows, length, scores, width, prefix_values.typed_data() + item * s * h, h, out);
    MixAll(rows, m, scores + length, width, to_values, h, out);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = mixed->typed_data() + place(r);
      for (int64_t j = 0; j < h; ++j) to[j] = out[r * h + j] / totals[r];
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxAttention, specjax::Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Ret<specjax::F32>()
                                  .Ret<specjax::F32>()
                                  .Ret<specjax::F32>());
