// One team of threads a process, and loops whose iterations are taken as threads get to them.
//
// The caller of a loop works on it and does not depend on anybody's help: it waits only for threads
// that have come to it by its end, most of which have an iteration. A thread that comes too late
// counts for a moment, too, until it has seen that there is nothing for it. On a machine with other work to do a worker may be put aside for
// milliseconds, which is many layers. Workers spin for a moment between loops, since the next one is
// a few microseconds away, and sleep after that. No more of them come to a loop than it has
// iterations for, and no more are woken than there are CPUs, however large the team is.
//
// Two engines may call at once. The second one works alone rather than wait: the operating system
// then shares the cores between them, and neither holds the other up for a whole layer.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>

#include <cstdio>
#include <cstring>
#endif

#include "tile_gemm.h"
#include "trace.h"

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
    static Pool* pool = new Pool(cores(), wanted_threads());
    return *pool;
  }

  // Calls `job(team)`; the loops of `team` are shared with the workers, unless another caller has
  // them.
  template <class Job>
  void run(Job job);

  int size() const { return size_; }

  // From now on no more than `threads` work on a call, for whoever measures.
  void limit(int threads) { limit_ = std::max(threads, 1); }

  // From now on calls are traced, as a team of `threads` would cut them.
  void start_trace(int threads) {
    std::lock_guard<std::mutex> lock(callers_);
    trace_.reset(new Trace(threads));
    tracing_ = true;
  }
  // Entries so far.
  long trace_length() {
    std::lock_guard<std::mutex> lock(callers_);
    return trace_ == nullptr ? 0 : static_cast<long>(trace_->entries.size());
  }
  // What was traced; null if nothing is.
  std::unique_ptr<Trace> end_trace() {
    std::lock_guard<std::mutex> lock(callers_);
    tracing_ = false;
    return std::move(trace_);
  }

 private:
  friend class Team;
  using Body = void (*)(const void* context, long i);
  static constexpr int kSpins = 3000;
  static constexpr int kMostThreads = 1024;
  // gate_: loops begun and ended so far, odd while one is open; how many workers may be in it; and
  // how many are.
  static constexpr uint64_t kPlace = uint64_t{1} << 16, kStep = uint64_t{1} << 32;
  static bool open(uint64_t gate) { return (gate / kStep) % 2 == 1; }
  static uint64_t places(uint64_t gate) { return gate / kPlace % (kStep / kPlace); }
  static uint64_t inside(uint64_t gate) { return gate % kPlace; }

  Pool(int cores, int threads)
      : size_(threads > 0 ? threads : cores), awake_(cores - 1), spins_(size_ > cores ? 0 : kSpins) {
    for (int i = 1; i < size_; i++) std::thread([this] { work(); }).detach();
  }

  // Calls `body(context, i)` for i in 0 .. count - 1, by no more than `threads` threads.
  void loop(long count, int threads, Body body, const void* context) {
    body_ = body;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    uint64_t helpers = std::min<long>(count, threads) - 1;
    // Sequentially consistent, as are a sleeper's steps: one of both sees what the other did.
    gate_.fetch_add(kStep + (helpers - places_) * kPlace);
    places_ = helpers;
    int asleep = sleepers_.load();
    if (asleep > 0) wake(asleep, static_cast<int>(helpers) - (size_ - 1 - asleep));
    take();
    gate_.fetch_add(kStep, std::memory_order_acq_rel);
    for (int spins = 0; inside(gate_.load(std::memory_order_acquire)); spins++) {
      spins < kSpins ? pause() : std::this_thread::yield();
    }
  }

  // Wakes some of those that are asleep: as many as are missing, and as may run at once.
  void wake(int asleep, int missing) {
    int count = std::min({asleep, missing, awake_});
    if (count <= 0) return;
    { std::lock_guard<std::mutex> lock(sleep_); }
    if (count == asleep) return wake_.notify_all();
    for (int i = 0; i < count; i++) wake_.notify_one();
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
      for (int i = 0; i < spins_ && !has_place(gate, done); i++) {
        pause();
        gate = gate_.load(std::memory_order_acquire);
      }
      if (!has_place(gate, done)) {
        release_tiles();  // a CPU whose tile registers are in use does not sleep deeply
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return has_place(gate = gate_.load(), done); });
        sleepers_.fetch_sub(1);
      }
      // Only a worker that got in while the loop is open, and found room, may look at it. An
      // unconditional step: of those that come at once, each has to have the line only once.
      gate = gate_.fetch_add(1, std::memory_order_acq_rel);
      if (has_place(gate, done)) take();
      if (open(gate)) done = gate / kStep;
      gate_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Whether a loop is open that a worker has not been in, with room for it.
  static bool has_place(uint64_t gate, uint64_t done) {
    return open(gate) && gate / kStep != done && inside(gate) < places(gate);
  }

  // Threads of the team, as the environment has it; 0 where it says nothing.
  static int wanted_threads() {
    const char* text = std::getenv("PSHARE_THREADS");
    return text == nullptr ? 0 : std::clamp(std::atoi(text), 0, kMostThreads);
  }

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

  const int size_;   // of the team, its caller included
  const int awake_;  // workers that can run beside a caller
  const int spins_;  // of a worker that waits for a loop; a core that somebody waits for is not spun on
  std::mutex callers_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> limit_{kMostThreads};
  std::atomic<bool> tracing_{false};
  std::unique_ptr<Trace> trace_;
  Body body_ = nullptr;
  const void* context_ = nullptr;
  long count_ = 0;
  uint64_t places_ = 0;  // of the last loop
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<long> next_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

// What one call may use of the pool.
class Team {
 public:
  // Of `size` threads; those of `pool`, or, as far as loops are cut for them, those of `trace`.
  Team(int size, Pool* pool, Trace* trace) : pool_(pool), trace_(trace), size_(size) {}
  int size() const { return size_; }

  // Names the loops that follow, for a trace.
  void at(const char* stage) { stage_ = stage; }

  // Calls `body(i)` for i in 0 .. count - 1, each once, in any order; returns when all are done.
  template <class Body>
  void loop(long count, Body body) {
    if (trace_ != nullptr) return trace_->loop(stage_, count, body);
    if (pool_ == nullptr || count <= 1) {
      for (long i = 0; i < count; i++) body(i);
      return;
    }
    pool_->loop(
        count, size_, [](const void* context, long i) { (*static_cast<const Body*>(context))(i); }, &body);
  }

  // As `loop`, for iterations that are so short that some are taken at a time.
  template <class Body>
  void rows(long count, Body body) {
    long shares = std::min<long>(count, kShares * size_);
    loop(shares, [&](long share) {
      for (long i = count * share / shares; i < count * (share + 1) / shares; i++) body(i);
    });
  }

 private:
  static constexpr long kShares = 4;  // of a thread, for an even end

  Pool* const pool_;
  Trace* const trace_;
  const int size_;
  const char* stage_ = "other";
};

template <class Job>
void Pool::run(Job job) {
  std::unique_lock<std::mutex> caller(callers_, std::defer_lock);
  if (tracing_) {
    caller.lock();
    if (trace_ != nullptr) {
      int64_t begin = Trace::now();
      Team team(trace_->threads, nullptr, trace_.get());
      job(team);
      release_tiles();
      trace_->called(begin);
      return;
    }
  } else {
    caller.try_lock();
  }
  int threads = caller.owns_lock() ? std::min<int>(limit_, size_) : 1;
  Team team(threads, threads > 1 ? this : nullptr, nullptr);
  job(team);
  release_tiles();  // the caller's thread may run code that shapes them in its own way
}

}  // namespace pshare
