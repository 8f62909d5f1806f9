// Sixteen floats at a time, and small products of rows with rows.
//
// Everything here is written in the vector extensions of GCC and Clang, which serve any processor.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace specjax {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Index __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

struct BFloat16 {
  uint16_t bits;  // the upper half of a float's
};

inline Vector Load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vector Load(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof(halves));
  const Index bits = __builtin_convertvector(halves, Index) << 16;
  Vector v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

inline Vector Load(const int8_t* p) {
#if defined(__AVX512F__)  // GCC would convert one by one
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vector>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
  __m256 halves[2];
  for (int i = 0; i < 2; ++i) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
    halves[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  Vector v;
  std::memcpy(&v, halves, sizeof(v));
  return v;
#else
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Vector);
#endif
}

// The first `count` numbers, then zeros.
template <class Number>
inline Vector LoadPart(const Number* p, int64_t count) {
  Number part[kLanes] = {};
  std::memcpy(part, p, count * sizeof(Number));
  return Load(part);
}

// Keeps a value in its register: GCC would rather load it again at each of its uses.
inline Vector Held(Vector v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}

inline void Store(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }

inline float ToFloat(float x) { return x; }

inline float ToFloat(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

inline void FromFloat(float x, float* y) { *y = x; }

// To the nearest, ties to even.
inline void FromFloat(float x, BFloat16* y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  y->bits = x != x ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

// Sums neighbouring lanes: those of a into the lower half, those of b into the upper half.
inline Vector AddPairs(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  const Index even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const Index odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

// Up to sixteen vectors to the vector of their sums. A sum's order does not depend on `Count`.
template <int Count>
inline Vector AddAcross(Vector* v) {
#pragma GCC unroll 4
  for (int left = Count, round = 0; round < 4; ++round, left = (left + 1) / 2) {
#pragma GCC unroll 8
    for (int i = 0; i < left; i += 2) v[i / 2] = AddPairs(v[i], v[i + 1 < left ? i + 1 : i]);
  }
  return v[0];
}

// Sixteen vectors, a matrix, to its columns.
#if defined(__AVX512F__)
inline void Transpose(__m512i* v) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

inline void Transpose(Vector* v) { Transpose(reinterpret_cast<__m512i*>(v)); }
#else
inline void Transpose(Vector* v) {
  for (int i = 1; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
  }
}
#endif

// exp(x) for x <= 0 to about one unit in the last place; 0 where a float would be subnormal, NaN
// for NaN.
inline Vector Exp(Vector x) {
  constexpr float kLowest = -87.3f, kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Index vanishes = x < kLowest;
  const Vector shifted = x * kLog2E + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln 2 / 2
  Vector y = r * (1.0f / 5040) + (1.0f / 720);        // the Taylor series suffices there
  y = y * r + (1.0f / 120);
  y = y * r + (1.0f / 24);
  y = y * r + (1.0f / 6);
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  Index bits, power;
  std::memcpy(&bits, &y, sizeof(y));
  std::memcpy(&power, &shifted, sizeof(shifted));
  // Times 2^n: kRound's own low bits are zero. Where the result vanishes, the sum may wrap around.
  typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Index))));
  bits = (Index)((Unsigned)bits + ((Unsigned)power << 23)) & ~vanishes;
  std::memcpy(&y, &bits, sizeof(y));
  return x != x ? x : y;
}

// x / (1 + exp(-x)).
inline Vector Silu(Vector x) {
  const Vector e = Exp(x > 0.0f ? -x : x);  // exp(-|x|)
  return (x > 0.0f ? x : x * e) / (1.0f + e);
}

// x Phi(x) in its tanh form (arXiv 1606.08415), which is x / (1 + exp(-2 u)).
inline Vector Gelu(Vector x) {
  constexpr float kTwiceSqrt2OverPi = 1.59576912f;
  const Vector twice = kTwiceSqrt2OverPi * (x + 0.044715f * x * x * x);
  const Vector e = Exp(twice > 0.0f ? -twice : twice);
  return (twice > 0.0f ? x : x * e) / (1.0f + e);
}

// tanh(x) to about two units in the last place.
inline Vector Tanh(Vector x) {
  const Vector magnitude = x > 0.0f ? x : -x, e = Exp(-2.0f * magnitude), z = x * x;
  // By its series where 1 - exp(-2 x) would lose digits.
  Vector series = z * (62.0f / 2835) - (17.0f / 315);
  series = series * z + (2.0f / 15);
  series = series * z - (1.0f / 3);
  const Vector near = magnitude + magnitude * (series * z);
  const Vector y = magnitude < 0.25f ? near : (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -y : y;
}

// log(x) of a normal positive float to about one unit in the last place.
inline Vector Log(Vector x) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  Index bits;
  std::memcpy(&bits, &x, sizeof(x));
  const Index exponent = (bits - kSqrtHalf) >> 23;  // so that sqrt(1/2) <= m < sqrt(2)
  bits -= exponent << 23;
  Vector m;
  std::memcpy(&m, &bits, sizeof(m));
  const Vector n = __builtin_convertvector(exponent, Vector);
  // log(m) = 2 atanh(s) with s = (m - 1) / (m + 1), |s| < 0.172, by its series.
  const Vector f = m - 1.0f, s = f / (m + 1.0f), z = s * s;
  Vector tail = z * (2.0f / 11) + (2.0f / 9);
  tail = tail * z + (2.0f / 7);
  tail = tail * z + (2.0f / 5);
  tail = tail * z + (2.0f / 3);
  const Vector half = 0.5f * f * f;  // 2 s = f - s f = f - f f / 2 + s f f / 2: no digit is lost
  return n * kLn2High + (f - (half - (s * (half + tail * z) + n * kLn2Low)));
}

// y[r, c] = sum_i x[r, i] w[c, i] for `Rows` rows of x and `Columns` of w; y has n columns.
//
// Each output is summed over i in sixteen lanes and then across them, in an order that depends on
// k alone. So a row's result does not depend on how many rows are computed with it.
template <int Rows, int Columns, class Weight>
inline void Tile(const float* x, const Weight* w, float* y, int64_t k, int64_t n) {
  constexpr int kSums = Rows * Columns;
  Vector sums[kSums] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Vector weights[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) weights[c] = Held(Load(w + c * k + i));
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) __builtin_prefetch(w + (2 * Columns + c) * k + i);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vector inputs = Held(Load(x + r * k + i));
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
  float totals[kSums + kLanes];
  if constexpr (kSums >= kLanes) Store(totals, AddAcross<kLanes>(sums));
  if constexpr (kSums % kLanes > 0) {
    constexpr int kDone = kSums / kLanes * kLanes;
    Store(totals + kDone, AddAcross<kSums % kLanes>(sums + kDone));
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Columns; ++c) y[r * n + c] = totals[r * Columns + c];
  }
}

// The same for any number m of rows.
template <int Columns, class Weight>
inline void Tiles(int64_t m, const float* x, const Weight* w, float* y, int64_t k, int64_t n) {
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

// y[0:m, 0:columns] = x[0:m] w[0:columns]^T; y has n columns.
template <class Weight>
inline void Product(int64_t m, int64_t columns, const float* x, const Weight* w, float* y,
                    int64_t k, int64_t n) {
  int64_t c = 0;
  if (m == 1) {
    for (; c + 8 <= columns; c += 8) Tile<1, 8>(x, w + c * k, y + c, k, n);
  }
  for (; c + 4 <= columns; c += 4) Tiles<4>(m, x, w + c * k, y + c, k, n);
  for (; c < columns; ++c) Tiles<1>(m, x, w + c * k, y + c, k, n);
}

}  // namespace specjax
