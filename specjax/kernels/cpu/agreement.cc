// Counts the newest tokens that stand before each slot of a text, too.

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

ffi::Error Agreement(ffi::Buffer<ffi::S32> tokens, ffi::Buffer<ffi::S32> length, int32_t ngram,
                     ffi::ResultBuffer<ffi::S32> agree) {
  const int64_t rows = tokens.dimensions()[0], slots = tokens.dimensions()[1];
  for (int64_t b = 0; b < rows; ++b) {
    const int32_t* text = tokens.typed_data() + b * slots;
    int32_t* found = agree->typed_data() + b * slots;
    const int64_t end = std::clamp<int64_t>(length.typed_data()[b], 0, slots);
    for (int64_t slot = 0; slot < end; ++slot) {
      const int64_t most = std::min<int64_t>(ngram, slot);
      int64_t n = 0;
      while (n < most && text[slot - 1 - n] == text[end - 1 - n]) ++n;
      found[slot] = n;
    }
    std::fill(found + end, found + slots, 0);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxAgreement, specjax::Agreement,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int32_t>("ngram")
                                  .Ret<ffi::Buffer<ffi::S32>>());
