// The attention of attention.h as XLA calls it.

#include "attention.h"

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Any = ffi::AnyBuffer;

template <class Number>
void Call(int64_t threads, F32 queries, F32 keys, F32 values, F32 cos, F32 sin,
          ffi::Buffer<ffi::PRED> mask, S32 skip, Any prefix_keys, Any prefix_values,
          S32 prefix_length, Any block_keys, Any block_values, F32 mixed, Any all_keys,
          Any all_values, float softcap) {
  const auto shape = keys.dimensions();
  auto numbers = [](const Any& buffer) { return static_cast<Number*>(buffer.untyped_data()); };
  Attention<Number> f;
  f.batch = shape[0];
  f.n = shape[1];
  f.kv_heads = shape[2];
  f.group = queries.dimensions()[3];
  f.h = shape[3];
  f.slots = prefix_keys.dimensions()[2];
  f.m = mask.dimensions()[2];
  f.queries = queries.typed_data();
  f.keys = keys.typed_data();
  f.values = values.typed_data();
  f.cos = cos.typed_data();
  f.sin = sin.typed_data();
  f.mask = mask.typed_data();
  f.skip = skip.typed_data();
  f.softcap = softcap;
  f.prefix_keys = numbers(prefix_keys);
  f.prefix_values = numbers(prefix_values);
  f.prefix_length = prefix_length.typed_data();
  f.block_keys = numbers(block_keys);
  f.block_values = numbers(block_values);
  f.mixed = mixed.typed_data();
  f.all_keys = numbers(all_keys);
  f.all_values = numbers(all_values);
  Run(threads, f);
}

ffi::Error Dispatch(ffi::ThreadPool pool, F32 queries, F32 keys, F32 values, F32 cos, F32 sin,
                    ffi::Buffer<ffi::PRED> mask, S32 skip, Any prefix_keys, Any prefix_values,
                    S32 prefix_length, Any block_keys, Any block_values,
                    ffi::ResultBuffer<ffi::F32> mixed, ffi::Result<Any> all_keys,
                    ffi::Result<Any> all_values, float softcap) {
  auto* call = prefix_keys.element_type() == ffi::BF16 ? Call<BFloat16> : Call<float>;
  call(pool.num_threads(), queries, keys, values, cos, sin, mask, skip, prefix_keys, prefix_values,
       prefix_length, block_keys, block_values, *mixed, *all_keys, *all_values, softcap);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxAttention, specjax::Dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<specjax::F32>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<specjax::S32>()
                                  .Arg<specjax::Any>()
                                  .Arg<specjax::Any>()
                                  .Arg<specjax::S32>()
                                  .Arg<specjax::Any>()
                                  .Arg<specjax::Any>()
                                  .Ret<specjax::F32>()
                                  .Ret<specjax::Any>()
                                  .Ret<specjax::Any>()
                                  .Attr<float>("softcap"));
