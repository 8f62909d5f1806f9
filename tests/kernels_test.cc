// The kernels without XLA, on buffers that end where their last element does, for the sanitizers.
//
//     kernels_test THREADS CALLERS ROUNDS
//
// CALLERS threads at once check ROUNDS random calls each: of products and of attention against sums
// in double, of the largest against a sort. Ends with 1 and one line at the first mismatch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../specjax/kernels/cpu/attention.h"
#include "../specjax/kernels/cpu/linear.h"
#include "../specjax/kernels/cpu/vocabulary.h"

namespace specjax {
namespace {

constexpr double kTolerance = 1e-6;  // of the sum of all magnitudes

[[noreturn]] void Fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::fflush(stdout);
  std::_Exit(1);  // helpers still run: nothing may be destroyed
}

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  int64_t Int(int64_t low, int64_t high) {  // both included
    return std::uniform_int_distribution<int64_t>(low, high)(bits_);
  }
  bool Bool() { return Int(0, 1); }
  float Normal() { return normal_(bits_); }

 private:
  std::mt19937_64 bits_;
  std::normal_distribution<float> normal_;
};

// An array that ends where its memory does and begins at no multiple of anything but its type.
template <class T>
class Array {
 public:
  Array(Random& random, int64_t size) : size(size), shift_(random.Int(0, 3)) {
    memory_ = static_cast<T*>(std::malloc((size + shift_) * sizeof(T) + (size + shift_ == 0)));
    std::memset(static_cast<void*>(memory_), 0x7f, (size + shift_) * sizeof(T));
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() const { return memory_ + shift_; }
  T& operator[](int64_t i) const { return data()[i]; }
  bool Intact() const {  // nothing was written before the beginning
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory_);
    return std::all_of(bytes, bytes + shift_ * sizeof(T), [](unsigned char b) { return b == 0x7f; });
  }
  const int64_t size;

 private:
  const int64_t shift_;
  T* memory_;
};

inline double Real(float x) { return x; }
inline double Real(BFloat16 x) { return ToFloat(x); }
inline double Real(int8_t x) { return x; }

inline void Draw(Random& random, float* x) { *x = random.Normal(); }
inline void Draw(Random& random, BFloat16* x) { FromFloat(random.Normal(), x); }
inline void Draw(Random& random, int8_t* x) { *x = static_cast<int8_t>(random.Int(-127, 127)); }

template <class T>
void Fill(Random& random, const Array<T>& array) {
  for (int64_t i = 0; i < array.size; ++i) Draw(random, array.data() + i);
}

// NaN or an infinity at a random place.
template <class T>
void Spoil(Random& random, const Array<T>& array) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float values[] = {std::nanf(""), kInfinity, -kInfinity};
  const float value = values[random.Int(0, 2)];
  if constexpr (sizeof(T) > 1) {
    if (array.size) FromFloat(value, array.data() + random.Int(0, array.size - 1));
  }
}

bool Near(float x, double exact, double margin) {
  if (std::isnan(exact) || std::isinf(exact)) {
    return std::isnan(exact) ? std::isnan(x) : x == static_cast<float>(exact);
  }
  return std::fabs(x - exact) <= margin;
}

bool Same(float x, float y) { return std::isnan(x) ? std::isnan(y) : x == y; }

// ----------------------------------------------------------------------------------------- products

struct Shape {
  int64_t m, k, n, count;
  bool normed, added, gated, gelu;

  std::string Name(const char* what, size_t bytes) const {
    char name[200];
    std::snprintf(name, sizeof(name),
                  "linear: %s: %d-byte weights, m %d, k %d, n %d, %d matrices, norm %d, residual %d, "
                  "gated %d, gelu %d",
                  what, static_cast<int>(bytes), static_cast<int>(m), static_cast<int>(k),
                  static_cast<int>(n), static_cast<int>(count), normed, added, gated,
                  gelu);
    return name;
  }
};

template <class Weight>
void CheckLinear(Random& random, int64_t threads) {
  constexpr bool kScaled = sizeof(Weight) == 1;
  Shape shape = {random.Int(0, 40), random.Int(1, 90), random.Int(0, 90), 1,
                 random.Bool(),     random.Bool(),     random.Bool(),       random.Bool()};
  switch (random.Int(0, 9)) {
    case 0: shape.k = random.Int(500, 1100); break;   // sums of several parts
    case 1: shape.n = random.Int(300, 1500); break;   // columns of several spans
    case 2: shape.m = random.Int(41, 130); break;
    case 3: shape.k = 512, shape.n = 64; break;       // weights used where they lie
    case 4: shape.m = 1; break;
  }
  if (shape.gated) {
    shape.count = 2;
    shape.added = false;
  } else if (!shape.added) {
    shape.count = random.Int(1, 3);
  }
  const auto [m, k, n, count, normed, added, gated, gelu] = shape;

  Array<float> x(random, m * k), gains(random, k), residual(random, m * n);
  Fill(random, x);
  Fill(random, gains);
  Fill(random, residual);
  std::vector<std::unique_ptr<Array<Weight>>> weights;
  std::vector<std::unique_ptr<Array<float>>> scales, ys;
  std::vector<int64_t> widths;
  for (int64_t j = 0; j < count; ++j) {
    widths.push_back(gated || added ? n : std::max<int64_t>(0, n - 7 * j));
    weights.push_back(std::make_unique<Array<Weight>>(random, widths[j] * k));
    scales.push_back(std::make_unique<Array<float>>(random, kScaled ? widths[j] : 0));
    Fill(random, *weights[j]);
    Fill(random, *scales[j]);
  }
  const int64_t kind = random.Int(0, 5);
  if (kind == 0) Spoil(random, x);
  if (kind == 1) Spoil(random, *weights[0]);

  const int64_t results = gated ? 1 : count;
  auto run = [&](int64_t on, int64_t first, int64_t rows) {
    ys.clear();
    Linear<Weight> f;
    f.m = rows;
    f.k = k;
    f.x = x.data() + first * k;
    f.gains = normed ? gains.data() : nullptr;
    f.eps = 1e-5f;
    f.residual = added ? residual.data() + first * n : nullptr;
    f.gated = gated;
    f.gelu = gelu;
    for (int64_t j = 0; j < count; ++j) {
      float* y = nullptr;
      if (j < results) {
        ys.push_back(std::make_unique<Array<float>>(random, rows * widths[j]));
        y = ys[j]->data();
      }
      f.matrices.push_back({weights[j]->data(), kScaled ? scales[j]->data() : nullptr, widths[j], y});
    }
    Run(on, f);
    for (const auto& y : ys) {
      if (!y->Intact()) Fail(shape.Name("written before the result", sizeof(Weight)));
    }
  };

  run(threads, 0, m);
  std::vector<double> row(k);
  std::vector<double> sums(2), sizes(2);
  for (int64_t r = 0; r < m; ++r) {
    double squares = 0;
    for (int64_t i = 0; i < k; ++i) squares += Real(x[r * k + i]) * x[r * k + i];
    const double factor = 1 / std::sqrt(squares / k + 1e-5f);
    for (int64_t i = 0; i < k; ++i) row[i] = normed ? x[r * k + i] * factor * gains[i] : x[r * k + i];
    for (int64_t j = 0; j < results; ++j) {
      for (int64_t c = 0; c < widths[j]; ++c) {
        for (int64_t part = 0; part < (gated ? 2 : 1); ++part) {
          const Weight* w = weights[j + part]->data() + c * k;
          sums[part] = sizes[part] = 0;
          for (int64_t i = 0; i < k; ++i) {
            sums[part] += row[i] * Real(w[i]);
            sizes[part] += std::fabs(row[i] * Real(w[i]));
          }
          const double scale = kScaled ? (*scales[j + part])[c] : 1;
          sums[part] *= scale;
          sizes[part] *= std::fabs(scale);
        }
        double exact = sums[0], margin = kTolerance * sizes[0] * (normed ? 2 : 1);
        if (gated) {
          const double x = exact, twice = 1.595769121605731 * (x + 0.044715 * x * x * x);
          const double by = gelu ? twice : x;
          const double gate = by < -700 ? 0 : x / (1 + std::exp(-by));
          margin = 1.2 * (margin * std::fabs(sums[1]) + std::fabs(gate) * kTolerance * 2 * sizes[1]);
          margin += kTolerance * std::fabs(gate * sums[1]) + 1e-37;  // a subnormal factor is zero
          exact = std::isnan(sums[0]) ? sums[0] : gate * sums[1];
        }
        if (added) {
          exact += residual[r * n + c];
          margin += kTolerance * std::fabs(residual[r * n + c]);
        }
        // What is infinite under a gate is left to the caller's own arithmetic.
        if (gated && (std::isinf(sums[0]) || std::isinf(sums[1]))) continue;
        const float found = (*ys[j])[r * widths[j] + c];
        if (!Near(found, exact, margin)) {
          char difference[120];
          std::snprintf(difference, sizeof(difference), "[%d, %d] is %.9g, not %.9g +- %.2g",
                        static_cast<int>(r), static_cast<int>(c), found, exact, margin);
          Fail(shape.Name(difference, sizeof(Weight)));
        }
      }
    }
  }

  // Fewer rows, other spans.
  const std::vector<std::unique_ptr<Array<float>>> together = std::move(ys);
  const int64_t first = m ? random.Int(0, m - 1) : 0, rows = m ? random.Int(1, m - first) : 0;
  run(random.Int(1, 9), first, rows);
  for (int64_t j = 0; j < results; ++j) {
    for (int64_t i = 0; i < rows * widths[j]; ++i) {
      if (!Same((*ys[j])[i], (*together[j])[first * widths[j] + i])) {
        Fail(shape.Name("a row depends on its company", sizeof(Weight)));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- attention

// Operands and results of one call.
template <class Number>
struct Call {
  Attention<Number> f;
  Array<float> queries, keys, values, cos, sin, mixed;
  Array<bool> mask;
  Array<Number> prefix_keys, prefix_values, block_keys, block_values, all_keys, all_values;
  Array<int32_t> prefix_length, skip;

  Call(Random& random, int64_t b, int64_t n, int64_t k, int64_t g, int64_t h, int64_t s, int64_t m)
      : queries(random, b * n * k * g * h),
        keys(random, b * n * k * h),
        values(random, b * n * k * h),
        cos(random, b * n * (h / 2)),
        sin(random, b * n * (h / 2)),
        mixed(random, b * n * k * g * h),
        mask(random, b * n * m),
        prefix_keys(random, b * k * s * h),
        prefix_values(random, b * k * s * h),
        block_keys(random, b * k * (m - n) * h),
        block_values(random, b * k * (m - n) * h),
        all_keys(random, b * k * m * h),
        all_values(random, b * k * m * h),
        prefix_length(random, b),
        skip(random, b * n) {
    f = {b,
         n,
         k,
         g,
         h,
         s,
         m,
         queries.data(),
         keys.data(),
         values.data(),
         cos.data(),
         sin.data(),
         mask.data(),
         skip.data(),
         0,
         prefix_keys.data(),
         prefix_values.data(),
         prefix_length.data(),
         block_keys.data(),
         block_values.data(),
         mixed.data(),
         all_keys.data(),
         all_values.data()};
  }

  [[noreturn]] void Report(const char* what) const {
    char name[200];
    std::snprintf(name, sizeof(name),
                  "attention: %s: %d-byte cache, b %d, n %d, k %d, g %d, h %d, s %d, m %d", what,
                  static_cast<int>(sizeof(Number)), static_cast<int>(f.batch),
                  static_cast<int>(f.n), static_cast<int>(f.kv_heads), static_cast<int>(f.group),
                  static_cast<int>(f.h), static_cast<int>(f.slots), static_cast<int>(f.m));
    Fail(name);
  }
};

inline void RotateExactly(const float* x, const float* cos, const float* sin, int64_t h, double* y) {
  for (int64_t j = 0; j < h / 2; ++j) {
    y[j] = Real(x[j]) * cos[j] - Real(x[h / 2 + j]) * sin[j];
    y[h / 2 + j] = Real(x[h / 2 + j]) * cos[j] + Real(x[j]) * sin[j];
  }
}

template <class Number>
void Compare(const Call<Number>& call) {
  const auto& f = call.f;
  const int64_t n = f.n, h = f.h, m = f.m;
  std::vector<double> q(h), scores, sum(h), size(h);
  std::vector<const Number*> seen;
  for (int64_t b = 0; b < f.batch; ++b) {
    for (int64_t head = 0; head < f.kv_heads; ++head) {
      const int64_t item = b * f.kv_heads + head;
      for (int64_t i = 0; i < n; ++i) {  // the block's new keys and values
        const int64_t from = ((b * n + i) * f.kv_heads + head) * h;
        const int64_t angle = (b * n + i) * (h / 2), to = (item * m + m - n + i) * h;
        RotateExactly(f.keys + from, f.cos + angle, f.sin + angle, h, q.data());
        for (int64_t j = 0; j < h; ++j) {
          const double margin = sizeof(Number) == 4 ? 1e-6 : 1.0 / 128;
          Number value;
          FromFloat(f.values[from + j], &value);
          const double key = Real(f.all_keys[to + j]);
          if (!(std::fabs(key - q[j]) <= margin * (1 + std::fabs(q[j])) || std::isnan(q[j])) ||
              !Same(ToFloat(f.all_values[to + j]), ToFloat(value))) {
            call.Report("a key or value of the block");
          }
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t g = 0; g < f.group; ++g) {
          const int64_t place = (((b * n + i) * f.kv_heads + head) * f.group + g) * h;
          const int64_t angle = (b * n + i) * (h / 2);
          RotateExactly(f.queries + place, f.cos + angle, f.sin + angle, h, q.data());
          seen.clear();
          scores.clear();
          auto see = [&](const Number* key, const Number* value) {
            double score = 0;
            for (int64_t j = 0; j < h; ++j) score += q[j] * Real(key[j]);
            score /= std::sqrt(static_cast<double>(h));
            scores.push_back(f.softcap > 0 ? f.softcap * std::tanh(score / f.softcap) : score);
            seen.push_back(value);
          };
          for (int64_t s = 0; s < f.prefix_length[b]; ++s) {
            const int64_t at = (item * f.slots + s) * h;
            see(f.prefix_keys + at, f.prefix_values + at);
          }
          for (int64_t j = 0; j < m; ++j) {
            const int64_t at = (item * m + j) * h;
            if (f.mask[(b * n + i) * m + j]) see(f.all_keys + at, f.all_values + at);
          }
          const int64_t skipped = f.skip[b * n + i];
          scores.erase(scores.begin(), scores.begin() + skipped);
          seen.erase(seen.begin(), seen.begin() + skipped);
          double peak = -std::numeric_limits<double>::infinity(), total = 0;
          bool nan = false;
          for (double score : scores) {
            peak = std::fmax(peak, score);
            nan |= std::isnan(score);
          }
          std::fill(sum.begin(), sum.end(), 0);
          std::fill(size.begin(), size.end(), 0);
          for (size_t s = 0; s < scores.size(); ++s) {
            const double weight = std::exp(scores[s] - peak);
            total += weight;
            for (int64_t j = 0; j < h; ++j) {
              sum[j] += weight * Real(seen[s][j]);
              size[j] += weight * std::fabs(Real(seen[s][j]));
            }
          }
          for (int64_t j = 0; j < h; ++j) {
            const double exact = nan ? std::nan("") : sum[j] / total;
            if (!Near(f.mixed[place + j], exact, 4 * kTolerance * size[j] / total)) {
              call.Report("a mixed value");
            }
          }
        }
      }
    }
  }
}

template <class Number>
void CheckAttention(Random& random, int64_t threads) {
  const int64_t b = random.Int(1, 3), n = random.Int(1, 12), k = random.Int(1, 3);
  const int64_t g = random.Int(1, 4), h = 2 * random.Int(1, 40);
  const int64_t s = random.Int(0, 4) ? random.Int(0, 60) : random.Int(100, 300);
  const int64_t m = n + (random.Bool() ? random.Int(0, 20) : 0);
  Call<Number> call(random, b, n, k, g, h, s, m);
  for (const auto* array : {&call.queries, &call.keys, &call.values}) Fill(random, *array);
  for (const auto* array :
       {&call.prefix_keys, &call.prefix_values, &call.block_keys, &call.block_values}) {
    Fill(random, *array);
  }
  for (int64_t i = 0; i < call.cos.size; ++i) {
    const float angle = random.Normal();
    call.cos[i] = std::cos(angle);
    call.sin[i] = std::sin(angle);
  }
  for (int64_t i = 0; i < b; ++i) call.prefix_length[i] = static_cast<int32_t>(random.Int(0, s));
  for (int64_t i = 0; i < call.mask.size; ++i) {
    call.mask[i] = random.Bool() || i % m == m - n + i / m % n;  // a node sees itself
  }
  for (int64_t i = 0; i < b * n; ++i) {
    const int64_t most = call.prefix_length[i / n];
    call.skip[i] = static_cast<int32_t>(random.Bool() ? random.Int(0, most) : 0);
  }
  call.f.softcap = random.Bool() ? 2 : 0;
  if (random.Int(0, 5) == 0) {
    const int64_t at = random.Int(0, call.keys.size - 1);
    call.keys[at] = std::nanf("");
  }
  Run(threads, call.f);
  Compare(call);

  // The first nodes alone, with what is before the new ones as it was.
  const int64_t few = random.Int(1, n), fewer = m - n + few;
  Call<Number> part(random, b, few, k, g, h, s, fewer);
  auto copy_rows = [&](const Array<float>& from, const Array<float>& to) {
    const int64_t width = from.size / (b * n);
    for (int64_t row = 0; row < b; ++row) {
      std::copy_n(from.data() + row * n * width, few * width, to.data() + row * few * width);
    }
  };
  copy_rows(call.queries, part.queries);
  copy_rows(call.keys, part.keys);
  copy_rows(call.values, part.values);
  copy_rows(call.cos, part.cos);
  copy_rows(call.sin, part.sin);
  std::copy_n(call.prefix_keys.data(), call.prefix_keys.size, part.prefix_keys.data());
  std::copy_n(call.prefix_values.data(), call.prefix_values.size, part.prefix_values.data());
  std::copy_n(call.block_keys.data(), call.block_keys.size, part.block_keys.data());
  std::copy_n(call.block_values.data(), call.block_values.size, part.block_values.data());
  std::copy_n(call.prefix_length.data(), b, part.prefix_length.data());
  part.f.softcap = call.f.softcap;
  for (int64_t row = 0; row < b; ++row) {
    std::copy_n(call.skip.data() + row * n, few, part.skip.data() + row * few);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        bool& sees = call.mask[(row * n + i) * m + j];
        if (j >= fewer && i < few) sees = false;
        if (i < few && j < fewer) part.mask[(row * few + i) * fewer + j] = sees;
      }
    }
  }
  Run(threads, call.f);
  Run(random.Int(1, 9), part.f);
  const int64_t width = k * g * h;
  for (int64_t row = 0; row < b; ++row) {
    for (int64_t i = 0; i < few * width; ++i) {
      if (!Same(call.mixed[row * n * width + i], part.mixed[row * few * width + i])) {
        call.Report("a row depends on its company");
      }
    }
  }
}

// The last of a chain of tokens, whatever part of the chain is in the prefix already.
template <class Number>
void CheckPlaces(Random& random, int64_t threads) {
  const int64_t length = random.Int(2, random.Bool() ? 30 : 150), k = 2;
  const int64_t g = random.Int(1, 3), h = 2 * random.Int(1, 40);
  const int64_t window = random.Bool() ? random.Int(1, length) : length;  // tokens that one sees
  Call<Number> whole(random, 1, length, k, g, h, 1, length);
  for (const auto* array : {&whole.queries, &whole.keys, &whole.values}) Fill(random, *array);
  for (int64_t i = 0; i < whole.cos.size; ++i) {
    whole.cos[i] = std::cos(static_cast<float>(i));
    whole.sin[i] = std::sin(static_cast<float>(i));
  }
  std::fill_n(whole.prefix_keys.data(), k * h, Number{});
  std::fill_n(whole.prefix_values.data(), k * h, Number{});
  whole.prefix_length[0] = 0;
  for (int64_t i = 0; i < length * length; ++i) whole.mask[i] = i % length <= i / length;
  for (int64_t i = 0; i < length; ++i) whole.skip[i] = std::max<int64_t>(0, i + 1 - window);
  Run(threads, whole.f);
  for (int64_t j : {int64_t{1}, length / 2, (length - 1) / 32 * 32, length - 1}) {
    const int64_t n = length - j, slots = j + random.Int(0, 5);
    Call<Number> call(random, 1, n, k, g, h, slots, n);
    std::copy_n(whole.queries.data() + j * k * g * h, call.queries.size, call.queries.data());
    std::copy_n(whole.keys.data() + j * k * h, call.keys.size, call.keys.data());
    std::copy_n(whole.values.data() + j * k * h, call.values.size, call.values.data());
    std::copy_n(whole.cos.data() + j * (h / 2), call.cos.size, call.cos.data());
    std::copy_n(whole.sin.data() + j * (h / 2), call.sin.size, call.sin.data());
    for (int64_t head = 0; head < k; ++head) {
      const int64_t from = head * length * h, to = head * slots * h;
      std::copy_n(whole.all_keys.data() + from, j * h, call.prefix_keys.data() + to);
      std::copy_n(whole.all_values.data() + from, j * h, call.prefix_values.data() + to);
    }
    call.prefix_length[0] = static_cast<int32_t>(j);
    for (int64_t i = 0; i < n * n; ++i) call.mask[i] = i % n <= i / n;
    for (int64_t i = 0; i < n; ++i) call.skip[i] = std::max<int64_t>(0, j + i + 1 - window);
    Run(threads, call.f);
    for (int64_t i = 0; i < call.mixed.size; ++i) {
      if (call.mixed[i] != whole.mixed[j * k * g * h + i]) {
        call.Report("a row depends on where its history lies");
      }
    }
  }
}

// -------------------------------------------------------------------------------------- vocabulary

void CheckLargest(Random& random, int64_t threads) {
  const int64_t rows = random.Int(0, 6), size = random.Int(1, random.Bool() ? 40 : 1000);
  const int64_t k = random.Int(0, 3) ? std::min(size, random.Int(1, 20)) : random.Int(1, size);
  Array<float> x(random, rows * size);
  Array<int32_t> ids(random, rows * k);
  Fill(random, x);
  const int64_t kind = random.Int(0, 4);
  for (int64_t i = 0; i < x.size; ++i) {
    if (kind == 1) x[i] = std::round(x[i]);  // ties
    if (kind == 2 && random.Bool()) x[i] = -std::numeric_limits<float>::infinity();
    if (kind == 3) x[i] = static_cast<float>(i);  // every number is larger than those before it
  }
  if (kind == 4) Spoil(random, x);
  LargestIds(threads, rows, size, k, x.data(), ids.data());
  if (!ids.Intact()) Fail("largest: written before the result");
  std::vector<float> row(size);
  std::vector<int32_t> order(size);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < size; ++i) {
      const float number = x[r * size + i];
      row[i] = std::isnan(number) ? -std::numeric_limits<float>::infinity() : number;
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    for (int64_t i = 0; i < k; ++i) {
      if (ids[r * k + i] != order[i]) {
        char name[160];
        std::snprintf(name, sizeof(name), "largest: [%d, %d] is %d, not %d: rows %d, size %d, k %d",
                      static_cast<int>(r), static_cast<int>(i), ids[r * k + i], order[i],
                      static_cast<int>(rows), static_cast<int>(size), static_cast<int>(k));
        Fail(name);
      }
    }
  }
}

void Check(uint64_t seed, int64_t threads, int64_t rounds) {
  Random random(seed);
  for (int64_t round = 0; round < rounds; ++round) {
    CheckLinear<float>(random, threads);
    CheckLinear<BFloat16>(random, threads);
    CheckLinear<int8_t>(random, threads);
    CheckAttention<float>(random, threads);
    CheckAttention<BFloat16>(random, threads);
    CheckPlaces<float>(random, threads);
    CheckPlaces<BFloat16>(random, threads);
    CheckLargest(random, threads);
  }
}

}  // namespace
}  // namespace specjax

int main(int argc, char** argv) {
  if (argc != 4) specjax::Fail("usage: kernels_test THREADS CALLERS ROUNDS");
  const int64_t threads = std::atoll(argv[1]), callers = std::atoll(argv[2]);
  const int64_t rounds = std::atoll(argv[3]);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < callers; ++i) {
    others.emplace_back([=] { specjax::Check(i, threads, rounds); });
  }
  specjax::Check(0, threads, rounds);
  for (auto& other : others) other.join();
  return 0;
}
