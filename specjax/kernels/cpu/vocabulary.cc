// Argmax, the k largest and softmax of rows over a vocabulary.

#include "vocabulary.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

constexpr int64_t kAlone = 1 << 16;  // numbers that are not worth a second thread

using F32 = ffi::Buffer<ffi::F32>;

// Calls work(begin, width) for each part of a row; all but the last have kLanes numbers.
template <class Work>
inline void Parts(int64_t size, const Work& work) {
  for (int64_t i = 0; i < size; i += kLanes) work(i, std::min<int64_t>(kLanes, size - i));
}

// kLanes numbers, of which those beyond `width` are `rest`.
inline Vector LoadOr(const float* p, int64_t width, float rest) {
  if (width == kLanes) return Load(p);
  float part[kLanes];
  std::fill_n(part, kLanes, rest);
  std::memcpy(part, p, width * sizeof(float));
  return Load(part);
}

// NaN if there is one.
inline float Largest(const Vector& top, const Vector& sum_of_nan) {
  float largest = top[0], nan = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    largest = std::max(largest, top[lane]);
    nan += sum_of_nan[lane];
  }
  return largest + nan;
}

template <class At>  // kLanes numbers from i on, of which `width` count
inline float Peak(int64_t size, const At& at) {
  Vector top = Vector{} + kNothing, nan = {};
  Parts(size, [&](int64_t i, int64_t width) {
    const Vector x = at(i, width);
    top = x > top ? x : top;
    nan = x != x ? x : nan;
  });
  return Largest(top, nan);
}

// The lowest id of the largest number of each row of x + noise; V where there is a NaN.
ffi::Error Argmax(ffi::ThreadPool pool, F32 x, F32 noise, ffi::ResultBuffer<ffi::S32> ids) {
  const int64_t rows = ids->element_count(), size = x.dimensions().back();
  const bool noisy = noise.element_count() > 0;
  const int64_t threads = rows * size > kAlone ? pool.num_threads() : 1;
  Team::For(threads, rows, [&](int64_t row) {
    const float* xs = x.typed_data() + row * size;
    const float* more = noise.typed_data() + row * size;
    auto at = [&](int64_t i, int64_t width) {
      const Vector v = LoadOr(xs + i, width, kNothing);
      return noisy ? v + LoadOr(more + i, width, 0) : v;
    };
    const float peak = Peak(size, at);
    int64_t found = size;
    for (int64_t i = 0; i < size && found == size; i += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, size - i);
      const Index is_peak = at(i, width) == peak;
      for (int64_t lane = width - 1; lane >= 0; --lane) {
        if (is_peak[lane]) found = i + lane;
      }
    }
    ids->typed_data()[row] = static_cast<int32_t>(found);
  });
  return ffi::Error::Success();
}

ffi::Error TopK(ffi::ThreadPool pool, F32 x, ffi::ResultBuffer<ffi::S32> ids) {
  const int64_t size = x.dimensions().back(), k = ids->dimensions().back();
  const int64_t rows = k ? ids->element_count() / k : 0;
  const int64_t threads = rows * size > kAlone ? pool.num_threads() : 1;
  LargestIds(threads, rows, size, k, x.typed_data(), ids->typed_data());
  return ffi::Error::Success();
}

ffi::Error Softmax(ffi::ThreadPool pool, F32 x, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t size = x.dimensions().back(), rows = size ? x.element_count() / size : 0;
  const int64_t threads = rows * size > kAlone ? pool.num_threads() : 1;
  Team::For(threads, rows, [&](int64_t row) {
    const float* xs = x.typed_data() + row * size;
    float* ys = y->typed_data() + row * size;
    const float peak = Peak(
        size, [&](int64_t i, int64_t width) { return LoadOr(xs + i, width, kNothing); });
    Vector sum = {};
    Parts(size, [&](int64_t i, int64_t width) {
      const Vector mass = Exp(LoadOr(xs + i, width, kNothing) - peak);
      std::memcpy(ys + i, &mass, width * sizeof(float));
      sum += mass;
    });
    const float total = AddAcross<1>(&sum)[0];
    Parts(size, [&](int64_t i, int64_t width) {
      const Vector law = LoadOr(ys + i, width, 0) / total;
      std::memcpy(ys + i, &law, width * sizeof(float));
    });
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxArgmax, specjax::Argmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxTopK, specjax::TopK,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<specjax::F32>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxSoftmax, specjax::Softmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<specjax::F32>()
                                  .Ret<specjax::F32>());
