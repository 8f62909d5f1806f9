// The products of linear.h as XLA calls them.
//
// Operands: x [m, k]; gains [k] and residual [m, n], each empty if there is none; then the matrices
// [n, k], all of one type; then, for int8, their scales [n].

#include "linear.h"

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

using F32 = ffi::Buffer<ffi::F32>;

template <class Weight>
ffi::Error Call(int64_t threads, F32 x, F32 gains, F32 residual, ffi::RemainingArgs& operands,
                ffi::RemainingRets& results, bool gated, bool gelu, float eps) {
  const bool scaled = sizeof(Weight) == 1;
  const size_t count = scaled ? operands.size() / 2 : operands.size();
  Linear<Weight> f;
  for (size_t j = 0; j < count; ++j) {
    const auto w = operands.get<ffi::AnyBuffer>(j);
    if (!w) return w.error();
    const float* scales = nullptr;
    if (scaled) {
      const auto of = operands.get<F32>(count + j);
      if (!of) return of.error();
      scales = of->typed_data();
    }
    float* y = nullptr;
    if (j < results.size()) {
      auto of = results.get<F32>(j);
      if (!of) return of.error();
      y = (*of)->typed_data();
    }
    f.k = w->dimensions()[1];
    f.matrices.push_back(
        {static_cast<const Weight*>(w->untyped_data()), scales, w->dimensions()[0], y});
  }
  f.m = x.dimensions()[0];
  f.x = x.typed_data();
  f.gains = gains.element_count() ? gains.typed_data() : nullptr;
  f.eps = eps;
  f.residual = residual.element_count() ? residual.typed_data() : nullptr;
  f.gated = gated;
  f.gelu = gelu;
  Run(threads, f);
  return ffi::Error::Success();
}

ffi::Error Dispatch(ffi::ThreadPool pool, F32 x, F32 gains, F32 residual,
                    ffi::RemainingArgs operands, ffi::RemainingRets results, bool gated,
                    bool gelu, float eps) {
  const auto w = operands.get<ffi::AnyBuffer>(0);
  if (!w) return w.error();
  const int64_t threads = pool.num_threads();
  switch (w->element_type()) {
    case ffi::F32:
      return Call<float>(threads, x, gains, residual, operands, results, gated, gelu, eps);
    case ffi::BF16:
      return Call<BFloat16>(threads, x, gains, residual, operands, results, gated, gelu, eps);
    case ffi::S8:
      return Call<int8_t>(threads, x, gains, residual, operands, results, gated, gelu, eps);
    default:
      return ffi::Error::InvalidArgument("linear: weights of an unknown type");
  }
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxLinear, specjax::Dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("gated")
                                  .Attr<bool>("gelu")
                                  .Attr<float>("eps"));

extern "C" int SpecjaxOnTiles() {
#if defined(SPECJAX_TILES)
  return specjax::TilesAllowed();
#else
  return 0;
#endif
}
