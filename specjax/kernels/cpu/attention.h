// Rotary softmax attention of a few rows over [prefix | block], reading only the history there is.
//
// A row sums over the keys it sees in order of their positions, wherever they are kept: a token's
// result does not depend on how much of its history is in the cache already, nor on other rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "threads.h"
#include "vector.h"

namespace specjax {

template <class Number>  // of the cache and the block
struct Attention {
  int64_t batch, n, kv_heads, group, h, slots, m;  // B, N, K, G, H, S, M
  const float *queries, *keys, *values;            // [B, N, K, G, H], [B, N, K, H], before rotation
  const float *cos, *sin;                          // [B, N, H / 2]
  const bool* mask;                                // [B, N, M]
  const Number *prefix_keys, *prefix_values;       // [B, K, S, H]
  const int32_t* prefix_length;                    // [B]
  const Number *block_keys, *block_values;         // [B, K, M - N, H], of earlier nodes
  float* mixed;                                    // [B, N, K, G, H]
  Number *all_keys, *all_values;                   // [B, K, M, H]
};

constexpr int kMaxVectors = 4;

// scores[r, 0:16] = sum_j q[r, j] columns[j] for `Rows` rows: 16 keys at once, two sums for each.
template <int Rows>
inline void Score(const float* q, const Vector* columns, int64_t h, float* scores,
                  int64_t stride) {
  constexpr int kSums = 2;
  Vector sums[Rows][kSums] = {};
  int64_t j = 0;
  for (; j + kSums <= h; j += kSums) {
#pragma GCC unroll 2
    for (int s = 0; s < kSums; ++s) {
      const Vector column = Held(columns[j + s]);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sums[r][s] += q[r * h + j + s] * column;
    }
  }
  for (; j < h; ++j) {
    for (int r = 0; r < Rows; ++r) sums[r][0] += q[r * h + j] * columns[j];
  }
  for (int r = 0; r < Rows; ++r) {
    Store(scores + r * stride, sums[r][0] + sums[r][1]);
  }
}

// scores[0:rows, 0:s] = q keys^T; writes up to kLanes - 1 columns more, for which `stride` has
// room. Meanwhile fetches the values [s, h], which are needed next.
template <class Number>
inline void Scores(int64_t rows, int64_t s, const float* q, const Number* keys,
                   const Number* values, int64_t h, float* scores, int64_t stride,
                   Vector* columns) {
  for (int64_t i = 0; i < s; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, s - i);
    for (int64_t j = 0; j < h; j += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, h - j), at = i * h + j;
      Vector v[kLanes];
      if (count == kLanes && width == kLanes) {
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) {
          v[c] = Load(keys + at + c * h);
          __builtin_prefetch(values + at + c * h, 0, 2);  // into the second cache
        }
      } else {
        for (int64_t c = 0; c < kLanes; ++c) {
          v[c] = LoadPart(keys + at + c * h, c < count ? width : 0);
        }
      }
      Transpose(v);
      std::copy_n(v, width, columns + j);
    }
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) Score<8>(q + r * h, columns, h, scores + r * stride + i, stride);
    for (; r + 4 <= rows; r += 4) Score<4>(q + r * h, columns, h, scores + r * stride + i, stride);
    for (; r + 2 <= rows; r += 2) Score<2>(q + r * h, columns, h, scores + r * stride + i, stride);
    for (; r < rows; ++r) Score<1>(q + r * h, columns, h, scores + r * stride + i, stride);
  }
}

// out[r, 0 : 16 Vectors] += sum_s weights[r, s] values[s, 0 : 16 Vectors].
template <int Rows, int Vectors, class Number>
inline void Mix(int64_t s, const float* weights, int64_t stride, const Number* values, int64_t h,
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
template <int Rows, class Number>
inline void MixRows(int64_t s, const float* weights, int64_t stride, const Number* values,
                    int64_t h, float* out) {
  int64_t j = 0;
  for (; j + kMaxVectors * kLanes <= h; j += kMaxVectors * kLanes) {
    Mix<Rows, kMaxVectors>(s, weights, stride, values + j, h, out + j);
  }
  for (; j + kLanes <= h; j += kLanes) {
    Mix<Rows, 1>(s, weights, stride, values + j, h, out + j);
  }
  if (j == h) return;
  for (int r = 0; r < Rows; ++r) {  // a vector of which a part is kept
    Vector sum = LoadPart(out + r * h + j, h - j);
    for (int64_t i = 0; i < s; ++i) {
      sum += weights[r * stride + i] * LoadPart(values + i * h + j, h - j);
    }
    std::memcpy(out + r * h + j, &sum, (h - j) * sizeof(float));
  }
}

template <class Number>
inline void MixAll(int64_t rows, int64_t s, const float* weights, int64_t stride,
                   const Number* values, int64_t h, float* out) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) {
    MixRows<6>(s, weights + r * stride, stride, values, h, out + r * h);
  }
  for (; r + 4 <= rows; r += 4) {
    MixRows<4>(s, weights + r * stride, stride, values, h, out + r * h);
  }
  for (; r + 2 <= rows; r += 2) {
    MixRows<2>(s, weights + r * stride, stride, values, h, out + r * h);
  }
  for (; r < rows; ++r) MixRows<1>(s, weights + r * stride, stride, values, h, out + r * h);
}

// out[0:h] += sum_i weights[i] values[seen[i]], a sum continued as `Mix` would.
template <class Number>
inline void MixSeen(int64_t count, const int32_t* seen, const float* weights, const Number* values,
                    int64_t h, float* out) {
  for (int64_t j = 0; j < h; j += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, h - j);
    Vector sum = width == kLanes ? Load(out + j) : LoadPart(out + j, width);
    for (int64_t i = 0; i < count; ++i) {
      const Number* value = values + seen[i] * h + j;
      sum += weights[i] * (width == kLanes ? Load(value) : LoadPart(value, width));
    }
    std::memcpy(out + j, &sum, width * sizeof(float));
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

// Rotates halves against each other, times `scale` (arXiv 2104.09864).
template <class Number>
inline void Rotate(const float* x, const float* cos, const float* sin, int64_t h, float scale,
                   Number* y) {
  const int64_t half = h / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[half + j];
    FromFloat((a * cos[j] - b * sin[j]) * scale, y + j);
    FromFloat((b * cos[j] + a * sin[j]) * scale, y + half + j);
  }
}

template <class Number>
void Run(int64_t threads, const Attention<Number>& f) {
  const int64_t n = f.n, h = f.h, m = f.m, earlier = m - n, rows = n * f.group;
  const float scale = 1 / std::sqrt(static_cast<float>(h));

  Team::For(threads, f.batch * f.kv_heads, [&](int64_t item) {
    const int64_t b = item / f.kv_heads, head = item % f.kv_heads;

    // The block: earlier nodes, then the new ones.
    Number *keys = f.all_keys + item * m * h, *values = f.all_values + item * m * h;
    std::copy_n(f.block_keys + item * earlier * h, earlier * h, keys);
    std::copy_n(f.block_values + item * earlier * h, earlier * h, values);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = ((b * n + i) * f.kv_heads + head) * h, angle = (b * n + i) * (h / 2);
      Rotate(f.keys + from, f.cos + angle, f.sin + angle, h, 1, keys + (earlier + i) * h);
      for (int64_t j = 0; j < h; ++j) {
        FromFloat(f.values[from + j], values + (earlier + i) * h + j);
      }
    }

    const int64_t length = std::clamp<int64_t>(f.prefix_length[b], 0, f.slots);
    const int64_t block = (m + kLanes - 1) / kLanes * kLanes;
    const int64_t width = (length + m + kLanes - 1) / kLanes * kLanes + kLanes;
    thread_local std::vector<float> scratch;
    thread_local std::vector<Vector> columns;
    scratch.resize(rows * (width + block + 2 * h));
    columns.resize(h + kLanes);
    float* scores = scratch.data();              // [rows, width]: the prefix, then what is seen
    float* of_block = scores + rows * width;     // [rows, block]: of every node
    float* q = of_block + rows * block;          // [rows, h]
    float* out = q + rows * h;                   // [rows, h]
    auto place = [&](int64_t r) {  // of row r of this head in queries and mixed
      return (((b * n + r / f.group) * f.kv_heads + head) * f.group + r % f.group) * h;
    };
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t angle = (b * n + r / f.group) * (h / 2);
      Rotate(f.queries + place(r), f.cos + angle, f.sin + angle, h, scale, q + r * h);
    }
    const Number* prefix_values = f.prefix_values + item * f.slots * h;
    Scores(rows, length, q, f.prefix_keys + item * f.slots * h, prefix_values, h, scores, width,
           columns.data());
    Scores(rows, m, q, keys, values, h, of_block, block, columns.data());
    std::fill_n(out, rows * h, 0.0f);
    thread_local std::vector<int32_t> seen;  // slots of the block, for each node
    seen.clear();
    seen.reserve(n * m);
    thread_local std::vector<int64_t> ends;
    ends.clear();
    for (int64_t i = 0; i < n; ++i) {
      const bool* mask = f.mask + (b * n + i) * m;
      for (int64_t j = 0; j < m; ++j) {
        if (mask[j]) seen.push_back(j);
      }
      ends.push_back(seen.size());
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t node = r / f.group;
      float* of_row = scores + r * width;
      int64_t end = length;
      for (int64_t i = node ? ends[node - 1] : 0; i < ends[node]; ++i) {
        of_row[end++] = of_block[r * block + seen[i]];
      }
      const int64_t padded = (end + kLanes - 1) / kLanes * kLanes;
      std::fill(of_row + end, of_row + padded, -std::numeric_limits<float>::infinity());
      of_block[r * block] = Softmax(of_row, padded);  // the total: these scores are used up
    }
    MixAll(rows, length, scores, width, prefix_values, h, out);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t node = r / f.group, begin = node ? ends[node - 1] : 0;
      MixSeen(ends[node] - begin, seen.data() + begin, scores + r * width + length, values, h,
              out + r * h);
      float* to = f.mixed + place(r);
      for (int64_t j = 0; j < h; ++j) to[j] = out[r * h + j] / of_block[r * block];
    }
  });
}

}  // namespace specjax
