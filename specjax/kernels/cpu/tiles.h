// Products of float32 rows with bfloat16 or int8 weights on AMX tiles, as accurate as in float32.
//
// A float32 is the exact sum of three bfloat16 numbers, of eight bits each. So a row of x becomes
// three columns of a tile, its parts, and the weights are multiplied as they are stored:
//
//     sums[c, j] += sum_i w[c, i] parts[j, i]    16 columns c of the result, 16 parts j, 32 inner i
//
// A sum's order depends on k alone, hence a row's result not on the rows computed with it.

#pragma once

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__linux__)
#define SPECJAX_TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>

#include "vector.h"

namespace specjax {

constexpr int kTile = 16;          // rows of a tile, and its columns of four bytes
constexpr int kStep = 2 * kTile;   // inner elements of a tile of bfloat16
constexpr int kParts = 3;          // of a float32
constexpr int kGroup = 16;         // rows of x whose parts are multiplied at once
constexpr int64_t kChunk = 512;    // inner elements summed within a tile: keeps rounding small
constexpr int64_t kPitch = kChunk + kStep;  // of copies: rows in different lines of the cache
constexpr int kWidth = 2 * kTile;  // columns of the result at once
constexpr int kLine = 64;          // bytes of memory fetched at once

// Whether the system lets this process use tiles; asked once.
inline bool TilesAllowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

inline int64_t Steps(int64_t k) { return (k + kStep - 1) / kStep; }

// Tiles that hold the parts of up to kGroup rows.
inline int64_t NumTiles(int64_t rows) { return (kParts * rows + kTile - 1) / kTile; }

// Bytes of m rows once packed: for each group [steps, tiles, 16, 32] bfloat16.
inline int64_t PackedSize(int64_t m, int64_t k) {
  return Steps(k) * (m / kGroup * NumTiles(kGroup) + NumTiles(m % kGroup)) * (kTile * kStep);
}

// The upper halves of 32 floats: bfloat16, rounded towards zero.
inline __m512i UpperHalves(__m512i a, __m512i b) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(kUpper), b);
}

// The parts of 32 floats, `stride` vectors apart. What is left after each is exact.
inline void Split(__m512 a, __m512 b, __m512i* parts, int64_t stride) {
  const __m512 keep = _mm512_castsi512_ps(_mm512_set1_epi32(0xffff0000));
  for (int part = 0; part < kParts; ++part) {
    parts[part * stride] = UpperHalves(_mm512_castps_si512(a), _mm512_castps_si512(b));
    a = a - _mm512_and_ps(a, keep);
    b = b - _mm512_and_ps(b, keep);
  }
}

// Packs up to kGroup rows x [rows, k]. If there are `gains` [k], each row is first multiplied by
// them and by its entry of `factors`.
inline void PackGroup(int64_t rows, const float* x, int64_t k, const float* factors,
                      const float* gains, BFloat16* packed) {
  const int64_t tiles = NumTiles(rows);
  __m512i parts[kParts * kGroup];
  for (int64_t j = kParts * rows; j < tiles * kTile; ++j) parts[j] = _mm512_setzero_si512();
  for (int64_t step = 0; step < Steps(k); ++step) {
    const int64_t i = step * kStep, left = k - i;
    const __mmask16 low = left >= kTile ? 0xffff : (1u << left) - 1;
    const __mmask16 high =
        left >= kStep ? 0xffff : (left > kTile ? (1u << (left - kTile)) - 1 : 0);
    for (int64_t r = 0; r < rows; ++r) {
      __m512 a = _mm512_maskz_loadu_ps(low, x + r * k + i);
      __m512 b = _mm512_maskz_loadu_ps(high, x + r * k + i + kTile);
      if (gains) {
        const __m512 factor = _mm512_set1_ps(factors[r]);
        a = a * factor * _mm512_maskz_loadu_ps(low, gains + i);
        b = b * factor * _mm512_maskz_loadu_ps(high, gains + i + kTile);
      }
      Split(a, b, parts + r, rows);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      __m512i v[kTile];
      std::copy_n(parts + tile * kTile, kTile, v);
      Transpose(v);
      BFloat16* to = packed + (step * tiles + tile) * (kTile * kStep);
      for (int j = 0; j < kTile; ++j) _mm512_store_si512(to + j * kStep, v[j]);
    }
  }
}

// Packs any number m of rows.
inline void Pack(int64_t m, const float* x, int64_t k, const float* factors, const float* gains,
                 BFloat16* packed) {
  for (int64_t r = 0; r < m; r += kGroup) {
    const int64_t rows = std::min<int64_t>(kGroup, m - r);
    PackGroup(rows, x + r * k, k, gains ? factors + r : nullptr, gains, packed);
    packed += PackedSize(rows, k);
  }
}

// Memory that begins where a line of the cache does.
template <class T>
class Scratch {
 public:
  T* Of(int64_t size) {
    memory_.resize(size + kLine / sizeof(T));
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
  }

 private:
  std::vector<T> memory_;
};

class TilesInUse {  // by this thread, all of them 16 x 64 bytes, at first zeros
 public:
  explicit TilesInUse(bool in_use) : in_use_(in_use) {
    if (!in_use) return;
    struct alignas(64) Shape {
      uint8_t palette = 1, rest[15] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Shape shape;
    _tile_loadconfig(&shape);
  }
  ~TilesInUse() {
    if (in_use_) _tile_release();
  }

 private:
  bool in_use_;
};

// Weights to fetch into the second cache while others are multiplied, in the order of memory: so
// the processor's own prefetching helps. A few after each product, for loads of tiles wait behind
// them.
struct Ahead {
  const char *next, *end;
  int64_t groups;  // of rows, during whose products they are fetched

  // What is due after one of the products of a step, `Lines` after all of them.
  template <int Lines, int Product, int Products>
  void Fetch() {
    if (next >= end) return;
#pragma GCC unroll 16
    for (int i = Lines * Product / Products; i < Lines * (Product + 1) / Products; ++i) {
      _mm_prefetch(next + i * kLine, _MM_HINT_T1);
    }
    if constexpr (Product + 1 == Products) next += Lines * kLine;
  }
};

// sums [2, 16, 16 Tiles] of 2 x 16 columns, whose weights lie `stride` bytes apart, over `steps`.
// Tiles 0 to 5 are zeros before and after: to clear one right behind its store delays nothing.
template <int Tiles, int Lines>
inline void Multiply(const BFloat16* w0, const BFloat16* w1, int64_t stride, const BFloat16* x,
                     int64_t steps, Ahead& ahead, float* sums) {
  asm volatile("" ::: "memory");  // GCC does not know that tiles are loaded from what was stored
  constexpr int kElements = kTile * kStep;
  for (int64_t step = 0; step < steps; ++step) {
    if constexpr (Tiles == 1) {
      _tile_loadd(6, w0, stride);
      _tile_loadd(7, w1, stride);
      _tile_loadd(5, x, 64);
      _tile_dpbf16ps(0, 6, 5);
      ahead.Fetch<Lines, 0, 2>();
      _tile_dpbf16ps(1, 7, 5);
      ahead.Fetch<Lines, 1, 2>();
    } else if constexpr (Tiles == 2) {
      _tile_loadd(4, w0, stride);
      _tile_loadd(6, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      ahead.Fetch<Lines, 0, 4>();
      _tile_loadd(7, x + kElements, 64);
      _tile_dpbf16ps(1, 4, 7);
      ahead.Fetch<Lines, 1, 4>();
      _tile_loadd(5, w1, stride);
      _tile_dpbf16ps(2, 5, 6);
      ahead.Fetch<Lines, 2, 4>();
      _tile_dpbf16ps(3, 5, 7);
      ahead.Fetch<Lines, 3, 4>();
    } else {
      _tile_loadd(7, x, 64);
      _tile_loadd(6, w0, stride);
      _tile_dpbf16ps(0, 6, 7);
      ahead.Fetch<Lines, 0, 6>();
      _tile_loadd(7, x + kElements, 64);
      _tile_dpbf16ps(1, 6, 7);
      ahead.Fetch<Lines, 1, 6>();
      _tile_loadd(7, x + 2 * kElements, 64);
      _tile_dpbf16ps(2, 6, 7);
      ahead.Fetch<Lines, 2, 6>();
      _tile_loadd(6, w1, stride);
      _tile_dpbf16ps(5, 6, 7);
      ahead.Fetch<Lines, 3, 6>();
      _tile_loadd(7, x + kElements, 64);
      _tile_dpbf16ps(4, 6, 7);
      ahead.Fetch<Lines, 4, 6>();
      _tile_loadd(7, x, 64);
      _tile_dpbf16ps(3, 6, 7);
      ahead.Fetch<Lines, 5, 6>();
    }
    w0 += kStep;
    w1 += kStep;
    x += Tiles * kElements;
  }
  constexpr int64_t kRow = Tiles * kTile * sizeof(float);
  float* second = sums + Tiles * 256;
  _tile_stored(0, sums, kRow);
  _tile_zero(0);
  if constexpr (Tiles == 1) {
    _tile_stored(1, second, kRow);
    _tile_zero(1);
    _tile_zero(5);
  } else if constexpr (Tiles == 2) {
    _tile_stored(1, sums + kTile, kRow);
    _tile_zero(1);
    _tile_stored(2, second, kRow);
    _tile_zero(2);
    _tile_stored(3, second + kTile, kRow);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  } else {
    _tile_stored(1, sums + kTile, kRow);
    _tile_zero(1);
    _tile_stored(2, sums + 2 * kTile, kRow);
    _tile_zero(2);
    _tile_stored(5, second + 2 * kTile, kRow);
    _tile_zero(5);
    _tile_stored(4, second + kTile, kRow);
    _tile_zero(4);
    _tile_stored(3, second, kRow);
    _tile_zero(3);
  }
}

// kStep weights as bfloat16: integers of eight bits are some, too.
inline __m512i Widened(const BFloat16* w) { return _mm512_loadu_si512(w); }

inline __m512i Widened(const int8_t* w) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
  const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
  return UpperHalves(_mm512_castps_si512(_mm512_cvtepi32_ps(low)),
                     _mm512_castps_si512(_mm512_cvtepi32_ps(high)));
}

// [rows, width] weights as [16, kPitch] bfloat16, the rest zeros.
template <class Weight>
inline void Widen(int64_t rows, int64_t width, const Weight* w, int64_t k, BFloat16* to) {
  for (int64_t c = 0; c < kTile; ++c, w += k, to += kPitch) {
    int64_t i = 0;
    if (c < rows) {
      for (; i + kStep <= width; i += kStep) _mm512_store_si512(to + i, Widened(w + i));
      if (i < width) {
        Weight rest[kStep] = {};
        std::memcpy(rest, w + i, (width - i) * sizeof(Weight));
        _mm512_store_si512(to + i, Widened(rest));
        i += kStep;
      }
    }
    for (; i < width; i += kStep) _mm512_store_si512(to + i, _mm512_setzero_si512());
  }
}

// y[0:rows, 0:columns] = x w^T of one group of packed rows, columns <= kWidth; y has n columns.
// Returns whether a NaN is among them.
template <int Tiles, class Weight>
inline bool ProductOfGroup(int64_t rows, int64_t columns, const BFloat16* x, const Weight* w,
                           float* y, int64_t k, int64_t n, Ahead ahead) {
  alignas(64) float sums[2 * Tiles * 256 + 2 * kTile], added[2 * Tiles * 256];
  alignas(64) BFloat16 copy[2][kTile * kPitch];
  const int64_t first = std::min<int64_t>(kTile, columns), second = columns - first;
  constexpr int kLines = kWidth * kStep * sizeof(Weight) / kLine;  // that hold a step's weights
  auto* multiply = ahead.groups == 1 ? Multiply<Tiles, kLines> : Multiply<Tiles, kLines / 2>;
  if (k == 0) std::fill(sums, std::end(sums), 0.0f);
  for (int64_t i = 0; i < k; i += kChunk) {
    const int64_t width = std::min(kChunk, k - i);
    const BFloat16 *w0 = nullptr, *w1 = nullptr;
    int64_t stride = 0;
    if constexpr (sizeof(Weight) == sizeof(BFloat16)) {
      if (columns == kWidth && width % kStep == 0) {
        w0 = w + i;
        w1 = w + kTile * k + i;
        stride = k * sizeof(BFloat16);
      }
    }
    if (!w0) {
      Widen(first, width, w + i, k, copy[0]);
      Widen(second, width, w + first * k + i, k, copy[1]);
      w0 = copy[0];
      w1 = copy[1];
      stride = kPitch * sizeof(BFloat16);
    }
    multiply(w0, w1, stride, x + i / kStep * Tiles * (kTile * kStep), Steps(width), ahead,
             i ? added : sums);
    if (i) {
      for (int j = 0; j < 2 * Tiles * 256; j += kLanes) {
        Store(sums + j, Load(sums + j) + Load(added + j));
      }
    }
  }
  bool nan = false;
  for (int half = 0; half < 2 && half * kTile < columns; ++half) {
    __m512i v[kTile];
    const float* parts = sums + half * Tiles * 256;
    for (int c = 0; c < kTile; ++c, parts += Tiles * kTile) {
      v[c] = reinterpret_cast<__m512i>(Load(parts) + (Load(parts + rows) + Load(parts + 2 * rows)));
    }
    Transpose(v);
    const int64_t count = half ? second : first;
    const __mmask16 mask = (1u << count) - 1;
    __mmask16 found = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 total = reinterpret_cast<__m512>(v[r]);
      _mm512_mask_storeu_ps(y + r * n + half * kTile, mask, total);
      found |= _mm512_mask_cmp_ps_mask(mask, total, total, _CMP_UNORD_Q);
    }
    nan |= found != 0;
  }
  return nan;
}

// y[0:m, 0:columns] = x w^T of packed rows, columns <= kWidth; y has n columns. Meanwhile fetches
// the weights of as many columns from `next`, if that is not null: not where all parts fit one
// tile, for then the product waits for memory anyway. Returns whether a NaN is among y.
template <class Weight>
inline bool ProductOfPacked(int64_t m, int64_t columns, const BFloat16* x, const Weight* w,
                            const Weight* next, float* y, int64_t k, int64_t n) {
  const int64_t groups = std::max<int64_t>(1, (m + kGroup - 1) / kGroup);
  const int64_t share = kWidth * k * sizeof(Weight) / groups;  // bytes to fetch during each
  const char* from = NumTiles(m) > 1 ? reinterpret_cast<const char*>(next) : nullptr;
  bool nan = false;
  for (int64_t r = 0; r < m; r += kGroup) {
    const int64_t rows = std::min<int64_t>(kGroup, m - r), tiles = NumTiles(rows);
    const Ahead ahead{from, from ? from + share : nullptr, groups};
    switch (tiles) {
      case 1: nan |= ProductOfGroup<1>(rows, columns, x, w, y, k, n, ahead); break;
      case 2: nan |= ProductOfGroup<2>(rows, columns, x, w, y, k, n, ahead); break;
      default: nan |= ProductOfGroup<3>(rows, columns, x, w, y, k, n, ahead); break;
    }
    x += PackedSize(rows, k);
    y += kGroup * n;
    if (from) from += share;
  }
  return nan;
}

}  // namespace specjax

#endif
