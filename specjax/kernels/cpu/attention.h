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
#include "tiles.h"
#include "vector.h"

namespace specjax {

template <class Number>  // of the cache and the block
struct Attention {
  int64_t batch, n, kv_heads, group, h, slots, m;  // B, N, K, G, H, S, M
  const float *queries, *keys, *values;            // [B, N, K, G, H], [B, N, K, H], before rotation
  const float *cos, *sin;                          // [B, N, H / 2]
  const bool* mask;                                // [B, N, M]
  const int32_t* skip;                             // [B, N], of what a token sees, from the first
  float softcap;                                   // scores become softcap tanh(score / softcap); 0: no
  const Number *prefix_keys, *prefix_values;       // [B, K, S, H]
  const int32_t* prefix_length;                    // [B]
  const Number *block_keys, *block_values;         // [B, K, M - N, H], of earlier nodes
  float* mixed;                                    // [B, N, K, G, H]
  Number *all_keys, *all_values;                   // [B, K, M, H]
};

constexpr int kMaxVectors = 4;
constexpr int64_t kPadding = 32;  // of a row's weights, so that tiles can multiply them
constexpr int64_t kMostRows = 64;  // of a head at once: their scores stay in a core's own cache

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

// The rows of one head: their queries, and places for what becomes of them.
template <class Number>
struct Head {
  int64_t nodes, group, h, length, m;
  const Number *prefix_keys, *prefix_values;  // [length, h]
  const Number *keys, *values;                // [m, h], of the block
  const float* queries;                       // [nodes * group, h], rotated and scaled
  const int32_t* seen;                        // slots of the block, for each node
  const int64_t* ends;                        // [nodes + 1], of each node's and of those before
  const int32_t* skip;                        // [nodes], see above
  float softcap;
  float* scores;                              // [nodes * group, width]
  int64_t width;
  float* of_block;  // [nodes * group, block_width], scores of every node
  int64_t block_width;
  float* out;  // [nodes * group, h]
};

// A row's scores to weights of what it sees, in order of positions, with zeros up to a multiple of
// kPadding. Returns their sum.
template <class Number>
inline float Weights(const Head<Number>& a, int64_t r) {
  const int64_t node = r / a.group;
  float* weights = a.scores + r * a.width;
  int64_t end = a.length;
  for (int64_t i = a.ends[node]; i < a.ends[node + 1]; ++i) {
    weights[end++] = a.of_block[r * a.block_width + a.seen[i]];
  }
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  if (a.softcap > 0) {
    for (int64_t i = 0; i < end; i += kLanes) {
      Store(weights + i, a.softcap * Tanh(Load(weights + i) / a.softcap));
    }
  }
  std::fill_n(weights, std::clamp<int64_t>(a.skip[node], 0, end - 1), kNothing);
  const int64_t padded = (end + kPadding - 1) / kPadding * kPadding;
  std::fill(weights + end, weights + padded, kNothing);
  return Softmax(weights, padded);
}

// out = softmax(queries keys^T) values.
template <class Number>
inline void Attend(const Head<Number>& a) {
  const int64_t rows = a.nodes * a.group, h = a.h;
  thread_local std::vector<Vector> columns;
  thread_local std::vector<float> totals;
  columns.resize(h + kLanes);
  totals.resize(rows);
  Scores(rows, a.length, a.queries, a.prefix_keys, a.prefix_values, h, a.scores, a.width,
         columns.data());
  Scores(rows, a.m, a.queries, a.keys, a.values, h, a.of_block, a.block_width, columns.data());
  for (int64_t r = 0; r < rows; ++r) totals[r] = Weights(a, r);
  std::fill_n(a.out, rows * h, 0.0f);
  MixAll(rows, a.length, a.scores, a.width, a.prefix_values, h, a.out);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = a.ends[r / a.group], end = a.ends[r / a.group + 1];
    float* out = a.out + r * h;
    MixSeen(end - begin, a.seen + begin, a.scores + r * a.width + a.length, a.values, h, out);
    for (int64_t j = 0; j < h; ++j) out[j] /= totals[r];
  }
}

#if defined(SPECJAX_TILES)
// Scores of bfloat16 keys; meanwhile fetches the values.
inline void ScoresOnTiles(int64_t rows, int64_t s, const BFloat16* packed, const BFloat16* keys,
                          const BFloat16* values, int64_t h, float* scores, int64_t stride) {
  for (int64_t i = 0; i < s; i += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, s - i);
    const char* soon = reinterpret_cast<const char*>(values + i * h);
    for (int64_t j = 0; j < count * h * 2; j += kLine) _mm_prefetch(soon + j, _MM_HINT_T1);
    const BFloat16* next = i + 2 * kWidth <= s ? keys + (i + kWidth) * h : nullptr;
    ProductOfPacked(rows, count, packed, keys + i * h, next, scores + i, h, stride);
  }
}

// Packs the values [begin, end) as tiles multiply by them, [steps, h / 32, 2, 16, 32]: two rows side
// by side, zeros beyond `count` rows and h columns. `begin` is even; row i lies at `row(i)`.
template <class Row>
inline void PackValues(int64_t begin, int64_t end, int64_t count, const Row& row, int64_t h,
                       BFloat16* packed) {
  alignas(64) static constexpr uint16_t kPairs[2][kStep] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i low = _mm512_load_si512(kPairs[0]), high = _mm512_load_si512(kPairs[1]);
  const int64_t full = (h + kStep - 1) / kStep * kStep;
  for (int64_t i = begin; i < end; i += 2) {
    const BFloat16* first = i < count ? row(i) : nullptr;
    const BFloat16* second = i + 1 < count ? row(i + 1) : nullptr;
    BFloat16* to = packed + i / kStep * kStep * full + i % kStep / 2 * kStep;
    for (int64_t j = 0; j < h; j += kStep, to += 2 * kTile * kStep) {
      const __mmask32 mask = h - j >= kStep ? ~0u : (1u << (h - j)) - 1;
      const __m512i a = first ? _mm512_maskz_loadu_epi16(mask, first + j) : _mm512_setzero_si512();
      const __m512i b = second ? _mm512_maskz_loadu_epi16(mask, second + j) : _mm512_setzero_si512();
      _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(to + kTile * kStep, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// to [16 Rows, 32] = from + weights values: rows of parts `pitch` apart, packed values [steps, 2, 16,
// 32]; rows of `from` and `to` are `full` apart.
template <int Rows>
inline void MixTiles(const BFloat16* weights, int64_t pitch, const BFloat16* values, int64_t steps,
                     const float* from, float* to, int64_t full) {
  const int64_t stride = pitch * sizeof(BFloat16), row = full * sizeof(float);
  asm volatile("" ::: "memory");  // as in Multiply
  _tile_loadd(0, from, row);
  _tile_loadd(1, from + kTile, row);
  if constexpr (Rows > 1) {
    _tile_loadd(2, from + kTile * full, row);
    _tile_loadd(3, from + kTile * full + kTile, row);
  }
  for (int64_t step = 0; step < steps; ++step, weights += kStep, values += kStep * full) {
    _tile_loadd(4, weights, stride);
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, values + kTile * kStep, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Rows > 1) {
      _tile_loadd(5, weights + kTile * pitch, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, row);
  _tile_zero(0);
  _tile_stored(1, to + kTile, row);
  _tile_zero(1);
  if constexpr (Rows > 1) {
    _tile_stored(2, to + kTile * full, row);
    _tile_zero(2);
    _tile_stored(3, to + kTile * full + kTile, row);
    _tile_zero(3);
    _tile_zero(5);
  }
  _tile_zero(4);
}

// The same for `rows` rows of parts, or a few more, and all columns.
inline void MixParts(int64_t rows, const BFloat16* weights, int64_t pitch, const BFloat16* values,
                     int64_t steps, const float* from, float* to, int64_t full) {
  for (int64_t r = 0; r < rows; r += 2 * kTile) {
    for (int64_t j = 0; j < full; j += kStep) {
      const int64_t at = r * full + j;
      auto* mix = rows - r > kTile ? MixTiles<2> : MixTiles<1>;
      mix(weights + r * pitch, pitch, values + j * kStep, steps, from + at, to + at, full);
    }
  }
}

// The same on tiles. They add up 32 positions at once: those of the prefix that fill such steps are
// shared by all rows; the rest of the prefix and what a node sees of the block it has for itself.
inline void AttendOnTiles(const Head<BFloat16>& a) {
  constexpr int64_t kMost = 128;  // values packed at once
  const TilesInUse tiles(true);
  const int64_t rows = a.nodes * a.group, own = kParts * a.group, h = a.h;
  const int64_t full = (h + kWidth - 1) / kWidth * kWidth;  // columns of tiles
  const int64_t shared = a.length / kStep * kStep;
  const int64_t pitch = Steps(a.width) * kStep + kStep, padded = kParts * rows + kWidth + own;
  thread_local Scratch<BFloat16> for_queries, for_parts, for_values;
  thread_local Scratch<float> for_sums;
  thread_local std::vector<float> totals;
  BFloat16* queries = for_queries.Of(PackedSize(rows, h));
  BFloat16* parts = for_parts.Of(padded * pitch);  // [rows, 3, pitch] of weights
  BFloat16* values = for_values.Of((std::max(kMost, a.m) + 2 * kStep) * full);
  float* sums = for_sums.Of((padded + own + kWidth) * full);  // [rows, 3, full]
  float* ending = sums + padded * full;                       // the same of one node
  totals.resize(rows);

  Pack(rows, a.queries, h, nullptr, nullptr, queries);
  ScoresOnTiles(rows, a.length, queries, a.prefix_keys, a.prefix_values, h, a.scores, a.width);
  ScoresOnTiles(rows, a.m, queries, a.keys, a.values, h, a.of_block, a.block_width);
  for (int64_t r = 0; r < rows; ++r) {
    totals[r] = Weights(a, r);
    const int64_t node = r / a.group, end = a.length + a.ends[node + 1] - a.ends[node];
    for (int64_t i = 0; i < end; i += kStep) {
      __m512i of_step[kParts];
      const float* weights = a.scores + r * a.width + i;
      Split(_mm512_loadu_ps(weights), _mm512_loadu_ps(weights + kTile), of_step, 1);
      for (int64_t part = 0; part < kParts; ++part) {
        _mm512_store_si512(parts + (kParts * r + part) * pitch + i, of_step[part]);
      }
    }
  }

  std::fill_n(sums, padded * full, 0.0f);
  for (int64_t i = 0; i < shared; i += kMost) {
    const int64_t count = std::min(kMost, shared - i);
    auto value = [&](int64_t j) { return a.prefix_values + (i + j) * h; };
    PackValues(0, count, count, value, h, values);
    MixParts(kParts * rows, parts + i, pitch, values, Steps(count), sums, sums, full);
  }
  const int64_t left = a.length - shared;
  std::fill_n(values, Steps(left + a.m) * kStep * full, BFloat16{});
  int64_t packed = 0;  // values that are not zeros
  const int32_t* before = nullptr;
  for (int64_t node = 0; node < a.nodes; ++node) {
    const int32_t* seen = a.seen + a.ends[node];
    const int64_t count = left + a.ends[node + 1] - a.ends[node];
    auto value = [&](int64_t j) {
      return j < left ? a.prefix_values + (shared + j) * h : a.values + seen[j - left] * h;
    };
    int64_t same = 0;  // values that the node before sees too
    if (before) {
      const int64_t most = std::min(count, packed);
      for (same = left; same < most && seen[same - left] == before[same - left];) ++same;
    }
    PackValues(same / 2 * 2, std::max(count, packed), count, value, h, values);
    packed = count;
    before = seen;
    MixParts(own, parts + node * own * pitch + shared, pitch, values, Steps(count),
             sums + node * own * full, ending, full);
    for (int64_t r = 0; r < a.group; ++r) {
      const float* of_row = ending + kParts * r * full;
      float* out = a.out + (node * a.group + r) * h;
      for (int64_t j = 0; j < h; ++j) {
        const float sum = of_row[j] + (of_row[full + j] + of_row[2 * full + j]);
        out[j] = sum / totals[node * a.group + r];
      }
    }
  }
}
#endif

inline void AttendFastest(const Head<float>& a) { Attend(a); }

inline void AttendFastest(const Head<BFloat16>& a) {
#if defined(SPECJAX_TILES)
  if (TilesAllowed()) return AttendOnTiles(a);
#endif
  Attend(a);
}

// Where a node's query of a head lies, and what it becomes.
template <class Number>
inline int64_t Place(const Attention<Number>& f, int64_t node, int64_t head, int64_t query) {
  return ((node * f.kv_heads + head) * f.group + query) * f.h;
}

template <class Number>
void Run(int64_t threads, const Attention<Number>& f) {
  const int64_t n = f.n, h = f.h, m = f.m, earlier = m - n;
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

    thread_local std::vector<int32_t> seen;
    thread_local std::vector<int64_t> ends;
    seen.clear();
    seen.reserve(n * m);
    ends.assign(1, 0);
    for (int64_t i = 0; i < n; ++i) {
      const bool* mask = f.mask + (b * n + i) * m;
      for (int64_t j = 0; j < m; ++j) {
        if (mask[j]) seen.push_back(j);
      }
      ends.push_back(seen.size());
    }

    // What no node sees is not read. The rest keeps its place in vectors and tiles: the same sums.
    const int32_t* skip = f.skip + b * n;
    const int64_t length = std::clamp<int64_t>(f.prefix_length[b], 0, f.slots);
    const int64_t least = std::clamp<int64_t>(*std::min_element(skip, skip + n), 0, length);
    const int64_t unseen = least / kPadding * kPadding;
    thread_local std::vector<int32_t> skips;
    skips.assign(skip, skip + n);
    for (int32_t& of_node : skips) of_node -= unseen;

    const int64_t most = std::max<int64_t>(1, kMostRows / f.group);  // nodes at once
    Head<Number> a;
    a.group = f.group;
    a.h = h;
    a.length = length - unseen;
    a.m = m;
    a.softcap = f.softcap;
    a.prefix_keys = f.prefix_keys + (item * f.slots + unseen) * h;
    a.prefix_values = f.prefix_values + (item * f.slots + unseen) * h;
    a.keys = keys;
    a.values = values;
    a.seen = seen.data();
    a.width = (a.length + m + kPadding - 1) / kPadding * kPadding + kLanes;
    a.block_width = (m + kLanes - 1) / kLanes * kLanes;
    const int64_t rows = most * f.group;
    thread_local std::vector<float> scratch;
    scratch.resize(rows * (a.width + a.block_width + 2 * h));
    a.scores = scratch.data();
    a.of_block = a.scores + rows * a.width;
    a.out = a.of_block + rows * a.block_width;
    float* queries = a.out + rows * h;
    a.queries = queries;
    for (int64_t first = 0; first < n; first += most) {
      a.nodes = std::min(most, n - first);
      a.ends = ends.data() + first;
      a.skip = skips.data() + first;
      for (int64_t r = 0; r < a.nodes * f.group; ++r) {
        const int64_t node = b * n + first + r / f.group, angle = node * (h / 2);
        const float* query = f.queries + Place(f, node, head, r % f.group);
        Rotate(query, f.cos + angle, f.sin + angle, h, scale, queries + r * h);
      }
      AttendFastest(a);
      for (int64_t r = 0; r < a.nodes * f.group; ++r) {
        const int64_t node = b * n + first + r / f.group;
        std::copy_n(a.out + r * h, h, f.mixed + Place(f, node, head, r % f.group));
      }
    }
  });
}

}  // namespace specjax
