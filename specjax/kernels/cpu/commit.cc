// Copies the first nodes of each row's path into its slots of every cache, in place.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace specjax {
namespace {

ffi::Error Commit(ffi::Buffer<ffi::S32> path, ffi::Buffer<ffi::S32> start,
                  ffi::Buffer<ffi::S32> count, ffi::RemainingArgs caches_and_news,
                  ffi::RemainingRets results) {
  const int64_t rows = path.dimensions()[0], width = path.dimensions()[1];
  const size_t num_caches = results.size();
  for (size_t layer = 0; layer < num_caches; ++layer) {
    const auto news = caches_and_news.get<ffi::AnyBuffer>(num_caches + layer);
    auto cache = results.get<ffi::AnyBuffer>(layer);
    if (!news || !cache) return ffi::Error::InvalidArgument("commit: a buffer is missing");
    const auto shape = (*cache)->dimensions();  // [B, K, S, H]
    const int64_t heads = shape[1], slots = shape[2], nodes = news->dimensions()[2];
    const size_t bytes = shape[3] * ffi::ByteWidth((*cache)->element_type());
    const char* from = static_cast<const char*>(news->untyped_data());
    char* to = static_cast<char*>((*cache)->untyped_data());
    for (int64_t b = 0; b < rows; ++b) {
      const int32_t* node = path.typed_data() + b * width;
      const int64_t first = start.typed_data()[b];
      const int64_t end = std::min<int64_t>(count.typed_data()[b], slots - first);
      for (int64_t head = b * heads; head < (b + 1) * heads; ++head) {
        for (int64_t i = 0; i < end; ++i) {
          const int64_t slot = head * slots + first + i;
          std::memcpy(to + slot * bytes, from + (head * nodes + node[i]) * bytes, bytes);
        }
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpecjaxCommit, specjax::Commit,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
