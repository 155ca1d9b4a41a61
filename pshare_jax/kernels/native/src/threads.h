// One team of threads a process, and loops whose iterations are taken as threads get to them.
//
// The caller of a loop works on it and does not depend on anybody's help: it waits only for threads
// that have taken an iteration. On a machine with other work to do a worker may be put aside for
// milliseconds, which is many layers. Workers spin for a moment between loops, since the next one is
// a few microseconds away, and sleep after that.
//
// Two engines may call at once. The second one works alone rather than wait: the operating system
// then shares the cores between them, and neither holds the other up for a whole layer.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>

#include <cstdio>
#include <cstring>
#endif

#include "tile_gemm.h"

namespace pshare {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // Never destroyed: workers may outlive static objects when the process exits.
  static Pool& instance() {
    static Pool* pool = new Pool(cores());
    return *pool;
  }

  // Calls `job(team)`; the loops of `team` are shared with the workers, unless another caller has
  // them.
  template <class Job>
  void run(Job job);

 private:
  friend class Team;
  using Body = void (*)(const void* context, long i);
  static constexpr int kSpins = 3000;
  // gate_: loops begun and ended so far, odd while one is open, and the workers in it.
  static constexpr uint64_t kStep = 1 << 16, kWorkers = kStep - 1;
  static bool open(uint64_t gate) { return (gate / kStep) % 2 == 1; }

  explicit Pool(int size) : size_(size) {
    for (int i = 1; i < size; i++) std::thread([this] { work(); }).detach();
  }

  // Calls `body(context, i)` for i in 0 .. count - 1.
  void loop(long count, Body body, const void* context) {
    body_ = body;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    // Sequentially consistent, as are a sleeper's steps: one of both sees what the other did.
    gate_.fetch_add(kStep);
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    take();
    gate_.fetch_add(kStep, std::memory_order_acq_rel);
    for (int spins = 0; gate_.load(std::memory_order_acquire) & kWorkers; spins++) {
      spins < kSpins ? pause() : std::this_thread::yield();
    }
  }

  void take() {
    for (;;) {
      long i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count_) return;
      body_(context_, i);
    }
  }

  void work() {
    uint64_t done = 0;  // the loop that this worker has been in
    for (;;) {
      uint64_t gate = gate_.load(std::memory_order_acquire);
      for (int i = 0; i < kSpins && !fresh(gate, done); i++) {
        pause();
        gate = gate_.load(std::memory_order_acquire);
      }
      if (!fresh(gate, done)) {
        release_tiles();  // a CPU whose tile registers are in use does not sleep deeply
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return fresh(gate = gate_.load(), done); });
        sleepers_.fetch_sub(1);
      }
      // Only a worker that got in while the loop is open may look at it.
      if (!gate_.compare_exchange_strong(gate, gate + 1, std::memory_order_acq_rel)) continue;
      take();
      done = gate / kStep;
      gate_.fetch_sub(1, std::memory_order_release);
    }
  }

  static bool fresh(uint64_t gate, uint64_t done) { return open(gate) && gate / kStep != done; }

  // CPUs that this process may use: by affinity, and by the quota of a container.
  static int cores() {
    int count = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) count = std::max(1, CPU_COUNT(&set));
    if (FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
      long quota = 0, period = 0;
      if (std::fscanf(file, "%ld %ld", &quota, &period) == 2 && quota > 0 && period > 0) {
        count = std::min<long>(count, std::max<long>(1, (quota + period - 1) / period));
      }
      std::fclose(file);
    }
#endif
    return count;
  }

  const int size_;
  std::mutex callers_, sleep_;
  std::condition_variable wake_;
  Body body_ = nullptr;
  const void* context_ = nullptr;
  long count_ = 0;
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<long> next_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

// What one call may use of the pool.
class Team {
 public:
  explicit Team(Pool* pool) : pool_(pool) {}
  int size() const { return pool_ == nullptr ? 1 : pool_->size_; }

  // Calls `body(i)` for i in 0 .. count - 1, each once, in any order; returns when all are done.
  template <class Body>
  void loop(long count, Body body) {
    if (pool_ == nullptr || count <= 1) {
      for (long i = 0; i < count; i++) body(i);
      return;
    }
    pool_->loop(
        count, [](const void* context, long i) { (*static_cast<const Body*>(context))(i); }, &body);
  }

 private:
  Pool* pool_;
};

template <class Job>
void Pool::run(Job job) {
  std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
  Team team(caller.owns_lock() && size_ > 1 ? this : nullptr);
  job(team);
  release_tiles();  // the caller's thread may run code that shapes them in its own way
}

}  // namespace pshare
