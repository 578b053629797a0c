// Threads that help with one product at a time.
//
// The caller works through numbered tickets and awake helpers take some of them. The caller never
// waits for a helper that has not begun, so one that gets no CPU because another process is busy
// costs nothing; an OpenMP team, whose every member must arrive, collapses there.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

// Covers back-to-back products. 50 us is 3% faster alone, half as fast when two processes compete.
constexpr std::chrono::microseconds SPIN{5};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class HelperThreads {
 public:
  explicit HelperThreads(int threads) {
    try {
      for (int i = 1; i < threads; ++i) std::thread(&HelperThreads::help, this).detach();
    } catch (const std::system_error&) {  // out of threads: those that started do
    }
  }

  // Runs ticket(0 .. count - 1) in any order. False, and nothing run, while serving another caller.
  bool run(const std::function<void(long)>& ticket, long count) {
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner) return false;
    ticket_ = &ticket;
    count_ = count;
    next_ = 0;
    home_ = sched_getcpu();
    open_ = true;
    bool asleep;
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      ++round_;
      asleep = sleepers_ > 0;
    }
    if (asleep) wake_.notify_all();
    drain();
    open_ = false;
    for (int spins = 0; inside_ != 0; ++spins) spins < 2000 ? relax() : (void)sched_yield();
    return true;
  }

 private:
  void drain() {
    for (long t = next_++; t < count_; t = next_++) (*ticket_)(t);
  }

  // Some kernels wake a helper on the caller's CPU and leave it there for seconds: it moves itself.
  void leave_home() const {
    const int home = home_;
    if (home < 0 || sched_getcpu() != home) return;
    cpu_set_t others = allowed_;
    CPU_CLR(home, &others);
    sched_setaffinity(0, sizeof others, &others);
  }

  void help() {
    for (long seen = 0;;) {
      const auto until = std::chrono::steady_clock::now() + SPIN;
      while (round_ == seen && std::chrono::steady_clock::now() < until)
        for (int i = 0; i < 8; ++i) relax();
      if (round_ == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        ++sleepers_;
        wake_.wait(lock, [&] { return round_ != seen; });
        --sleepers_;
      }
      seen = round_;
      ++inside_;  // before reading open_: run() closes first and then waits for inside_ == 0
      if (open_) leave_home(), drain();
      --inside_;
    }
  }

  cpu_set_t allowed_ = [] {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) CPU_ZERO(&set);
    return set;
  }();
  std::mutex owner_, sleep_;
  std::condition_variable wake_;
  int sleepers_ = 0;
  const std::function<void(long)>* ticket_ = nullptr;
  long count_ = 0;
  std::atomic<long> round_{0}, next_{0};
  std::atomic<int> inside_{0}, home_{-1};
  std::atomic<bool> open_{false};
};
