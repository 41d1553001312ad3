// A pool of threads for loops inside one kernel.
//
// A token of a small model is a hundred loops of a few microseconds each, so helpers spin for a short while before they
// sleep. Only one kernel has the pool at a time: another stream's kernel that finds it taken runs on its own thread
// alone, so that two generations at once do not multiply threads. The thread that starts a loop works on it too and
// never waits for helpers that have not started: on a busy machine a loop gets slower, but never stuck.

#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "simd.h"

namespace openelm {

INLINE void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  static Pool& shared() {
    static Pool* pool = new Pool;  // never destroyed: helpers may outlive main
    return *pool;
  }

  int threads() const { return wanted_.load(std::memory_order_relaxed); }

  void set_threads(int count) {
    std::lock_guard lock(taken_);
    wanted_ = count < 1 ? 1 : count;
  }

  // body(task) for every task in [0, tasks), in any order, on any of the threads; returns when all are done.
  template <class Body>
  void run(int64_t tasks, const Body& body) {
    if (tasks <= 1 || threads() == 1 || is_child_ || is_starter_ || !taken_.try_lock()) {
      for (int64_t task = 0; task < tasks; task++) body(task);
      return;
    }
    std::lock_guard lock(taken_, std::adopt_lock);
    start_helpers();
    is_starter_ = true;
    call_ = [](const void* body, int64_t task) { (*static_cast<const Body*>(body))(task); };
    body_ = &body;
    tasks_ = tasks;
    next_ = 0;
    open_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    // Also if a task throws: helpers must have left before the data they work on is destroyed.
    struct Closing {
      Pool& pool;
      ~Closing() {
        is_starter_ = pool.open_ = false;
        while (pool.inside_.load() != 0) pause_briefly();
      }
    } closing{*this};
    work();
  }

 private:
  static constexpr int kPatience = 4000;  // pauses before a helper sleeps: about 50 microseconds

  Pool() {
    // A forked child has no helpers, and the lock may be held forever.
    pthread_atfork(nullptr, nullptr, [] { is_child_ = true; });
  }

  void work() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) call_(body_, task);
  }

  void start_helpers() {
    try {
      for (; started_ < threads() - 1; started_++) std::thread([this, number = started_] { help(number); }).detach();
    } catch (const std::system_error&) {
      // The system refuses more threads: go on with those that started.
    }
  }

  void help(int number) {
    for (uint32_t seen = 0;;) {
      for (int i = 0; i < kPatience && epoch_.load(std::memory_order_acquire) == seen; i++) pause_briefly();
      epoch_.wait(seen);
      seen = epoch_.load();
      // While a thread is inside, the loop's description does not change; before it is open, no thread reads it.
      inside_.fetch_add(1);
      if (open_.load() && number < threads() - 1) work();
      inside_.fetch_sub(1);
    }
  }

  static inline std::atomic<bool> is_child_{false};
  static inline thread_local bool is_starter_ = false;  // this thread has the lock: a loop within its loop runs alone
  std::mutex taken_;
  std::atomic<int> wanted_{1};
  int started_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* body_ = nullptr;
  int64_t tasks_ = 0;
  // On separate cache lines: helpers poll one while others change.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<bool> open_{false};
};

// Calls body(begin, end) for ranges that cover [0, total), each at least `grain` long except the last.
template <class Body>
void for_ranges(int64_t total, int64_t grain, const Body& body) {
  auto& pool = Pool::shared();
  // Several ranges per thread, so that a delayed thread leaves the rest to others.
  int64_t most = pool.threads() * 8;
  int64_t size = (total + most - 1) / most;
  size = size < grain ? grain : size;
  pool.run((total + size - 1) / size, [&](int64_t task) {
    int64_t begin = task * size, end = begin + size;
    body(begin, end < total ? end : total);
  });
}

// Memory for one kernel's intermediate results, kept by the thread for the next; aligned to a cache line.
class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(64, bytes);
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(memory_);
  }
  ~Scratch() { std::free(memory_); }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace openelm
