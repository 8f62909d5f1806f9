// Copies pieces of a table to where they are wanted.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

ffi::Error Gather(ffi::AnyBuffer table, ffi::Buffer<ffi::S32> start,
                  ffi::Result<ffi::AnyBuffer> pieces) {
  const auto shape = table.dimensions();
  const int64_t entries = shape[0], count = start.element_count();
  const int64_t size = pieces->dimensions()[start.dimensions().size()];
  const size_t bytes = entries ? table.size_bytes() / entries : 0;
  if (!bytes) return ffi::Error::InvalidArgument("gather: the table is empty");
  const char* from = static_cast<const char*>(table.untyped_data());
  char* to = static_cast<char*>(pieces->untyped_data());
  for (int64_t i = 0; i < count; ++i, to += size * bytes) {
    const int64_t first = start.typed_data()[i];
    if (first >= 0 && first + size <= entries) {
      std::memcpy(to, from + first * bytes, size * bytes);
      continue;
    }
    for (int64_t j = 0; j < size; ++j) {
      const int64_t entry = std::clamp<int64_t>(first + j, 0, entries - 1);
      std::memcpy(to + j * bytes, from + entry * bytes, bytes);
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxGather, specjax::Gather,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
