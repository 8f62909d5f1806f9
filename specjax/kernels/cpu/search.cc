// Finds the ranges of sorted suffixes that begin with strings and go on.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

// One end of the range of one string, which lies in [low, high].
struct Bound {
  const int32_t* wanted;
  int32_t size;
  bool is_end;  // behind all that begin with the string, else before the first that goes on
  int64_t low, high, middle;
  const int32_t* suffix;
};

// Whether the suffix comes before the bound. `length` tokens of it are there; the last token of all
// repeats itself behind them.
bool Precedes(const Bound& bound, int64_t length) {
  for (int32_t i = 0; i < bound.size; ++i) {
    const int32_t seen = bound.suffix[std::min<int64_t>(i, length - 1)];
    if (seen != bound.wanted[i]) return seen < bound.wanted[i];
  }
  return bound.is_end || bound.suffix[std::min<int64_t>(bound.size, length - 1)] < 0;
}

ffi::Error Search(ffi::Buffer<ffi::S32> order, ffi::Buffer<ffi::S32> tokens,
                  ffi::Buffer<ffi::S32> wanted, ffi::Buffer<ffi::S32> sizes,
                  ffi::ResultBuffer<ffi::S32> ranges) {
  const auto shape = wanted.dimensions();  // [B, M, W]
  const int64_t places = order.element_count();
  const int32_t *starts = order.typed_data(), *text = tokens.typed_data();
  std::vector<Bound> bounds(2 * shape[0] * shape[1]);
  for (size_t i = 0; i < bounds.size(); ++i) {
    const int64_t string = i / 2;
    bounds[i] = {wanted.typed_data() + string * shape[2], sizes.typed_data()[string % shape[1]],
                 i % 2 == 1, 0, places, 0, nullptr};
  }
  // All together, a step at a time: what one waits for from memory comes while others ask.
  for (int64_t left = places; left > 0; left /= 2) {
    for (Bound& bound : bounds) {
      bound.middle = std::min((bound.low + bound.high) / 2, places - 1);
      __builtin_prefetch(starts + bound.middle);
    }
    for (Bound& bound : bounds) {
      bound.suffix = text + starts[bound.middle];
      __builtin_prefetch(bound.suffix);
      __builtin_prefetch(bound.suffix + bound.size);
    }
    for (Bound& bound : bounds) {
      if (bound.low >= bound.high) continue;
      if (Precedes(bound, text + places - bound.suffix)) {
        bound.low = bound.middle + 1;
      } else {
        bound.high = bound.middle;
      }
    }
  }
  for (size_t i = 0; i < bounds.size(); ++i) ranges->typed_data()[i] = bounds[i].low;
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxSearch, specjax::Search,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
