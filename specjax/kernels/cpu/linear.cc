// y[m, n] = sum_k x[m, k] * w[n, k] for a few rows m: one pass over the weights, whatever m is.

#include <cstdint>

#include "threads.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

constexpr int64_t kSpanBytes = 64 << 10;  // of weights, claimed at once by a thread

ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                  ffi::ResultBuffer<ffi::F32> y) {
  const int64_t n = w.dimensions()[0], k = w.dimensions()[1];
  const int64_t m = k == 0 ? 0 : static_cast<int64_t>(x.element_count()) / k;
  const float *xs = x.typed_data(), *ws = w.typed_data();
  float* ys = y->typed_data();
  const int64_t width = std::max<int64_t>(8, kSpanBytes / std::max<int64_t>(1, k * 4) / 8 * 8);
  Team::For(pool, (n + width - 1) / width, [&](int64_t i) {
    const int64_t begin = i * width, columns = std::min(width, n - begin);
    Product(m, columns, xs, ws + begin * k, ys + begin, k, n);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxLinear, specjax::Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
