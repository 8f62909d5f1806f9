// A loop shared by a few threads that stay awake between the products of one pass.
//
// The work of one call takes tens of microseconds; waking a sleeping thread takes as long. So a
// helper looks for new work for a while before it sleeps. The caller takes indices from the end and
// helpers take them from the beginning: so a thread mostly gets what it had the last time, and
// finds the weights of a small model in its own cache.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace specjax {

class Team {
 public:
  // Calls work(i) for each i in [0, n), on one thread or on as many as the first call for several
  // asked for, but no more than there are processors. The caller works too, and waits only for what
  // helpers have begun. A call while another caller has the team runs alone.
  template <class Work>
  static void For(int64_t threads, int64_t n, const Work& work) {
    Team* team = threads < 2 || n < 2 || n > kMostIndices ? nullptr : Shared(threads);
    if (!team || team->helpers_ == 0 || team->busy_.test_and_set(std::memory_order_acquire)) {
      for (int64_t i = 0; i < n; ++i) work(i);
      return;
    }
    team->Share(n, &work, [](const void* f, int64_t i) { (*static_cast<const Work*>(f))(i); });
    team->busy_.clear(std::memory_order_release);
  }

 private:
  using Call = void (*)(const void*, int64_t);
  static constexpr int64_t kMostThreads = 16;
  static constexpr int kIndexBits = 20;
  static constexpr int64_t kMostIndices = (1 << kIndexBits) - 1;
  static constexpr int kPauses = 256;
  static constexpr std::chrono::microseconds kAwake{200};

  static Team* Shared(int64_t threads) {
    static Team* team = new Team(
        std::min<int64_t>({threads, std::thread::hardware_concurrency(), kMostThreads}));
    return team;
  }

  explicit Team(int64_t threads) : helpers_(std::max<int64_t>(0, threads - 1)) {
    for (int64_t i = 0; i < helpers_; ++i) std::thread([this] { Help(); }).detach();
  }

  void Share(int64_t n, const void* work, Call call) {
    work_.store(work, std::memory_order_relaxed);
    call_.store(call, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    const uint64_t loop = (left_.load(std::memory_order_relaxed) >> 2 * kIndexBits) + 1;
    left_.store(loop << 2 * kIndexBits | static_cast<uint64_t>(n) << kIndexBits);
    if (asleep_.load() > 0) left_.notify_all();
    while (Claim(/*from_end=*/true)) {
    }
    for (int i = 0; finished_.load(std::memory_order_acquire) < n; ++i) {
      if (i < kPauses) {
        Pause();
      } else {
        std::this_thread::yield();  // the helper may need this very processor
      }
    }
  }

  // Runs one index, if one is left. The exchange succeeds only while that index is unclaimed, hence
  // its loop unfinished, hence `work` and `call` still its own.
  bool Claim(bool from_end) {
    constexpr uint64_t kEnd = uint64_t{1} << kIndexBits;
    uint64_t left = left_.load(std::memory_order_acquire);
    while (AnyLeft(left)) {
      const void* work = work_.load(std::memory_order_relaxed);
      const Call call = call_.load(std::memory_order_relaxed);
      if (left_.compare_exchange_weak(left, from_end ? left - kEnd : left + 1,
                                      std::memory_order_acq_rel, std::memory_order_acquire)) {
        call(work, from_end ? End(left) - 1 : Begin(left));
        finished_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
    return false;
  }

  void Help() {
    auto last = std::chrono::steady_clock::now();
    for (;;) {
      if (Claim(false)) {
        while (Claim(false)) {
        }
        last = std::chrono::steady_clock::now();
      } else if (std::chrono::steady_clock::now() - last < kAwake) {
        std::this_thread::yield();  // to XLA's own threads
      } else {
        asleep_.fetch_add(1);  // whoever publishes work from here on notifies
        const uint64_t left = left_.load();
        if (!AnyLeft(left)) left_.wait(left);
        asleep_.fetch_sub(1);
        last = std::chrono::steady_clock::now();
      }
    }
  }

  static int64_t Begin(uint64_t left) { return left & kMostIndices; }
  static int64_t End(uint64_t left) { return left >> kIndexBits & kMostIndices; }
  static bool AnyLeft(uint64_t left) { return Begin(left) < End(left); }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  const int64_t helpers_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<const void*> work_{nullptr};
  std::atomic<Call> call_{nullptr};
  std::atomic<int> asleep_{0};
  alignas(64) std::atomic<uint64_t> left_{0};  // number of the loop, end and begin of what is left
  alignas(64) std::atomic<int64_t> finished_{0};
};

}  // namespace specjax
