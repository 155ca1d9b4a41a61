// One team of threads a process. A caller brings itself along; workers spin for a moment between
// calls, since the next layer is a few microseconds away, and sleep after that.
//
// Two engines may call at once. The second one works alone rather than wait: the operating system
// then shares the cores between them, and neither holds the other up for a whole layer.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace pshare {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that work on one call: loops whose iterations are taken as threads get to them, each
// followed by a barrier.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }

  template <class Body>
  void loop(long count, Body body) {
    if (size_ == 1) {
      for (long i = 0; i < count; i++) body(i);
      return;
    }
    for (;;) {
      long i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) break;
      body(i);
    }
    barrier();
  }

 private:
  void barrier() {
    int phase = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    // Yielding lets a partner in that the operating system has put aside.
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
      spins < 4000 ? pause() : std::this_thread::yield();
    }
  }

  const int size_;
  alignas(64) std::atomic<long> next_{0};
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<int> phase_{0};
};

class Pool {
 public:
  using Job = std::function<void(Team&)>;

  // Never destroyed: workers may outlive static objects when the process exits.
  static Pool& instance() {
    static Pool* pool = new Pool(cores());
    return *pool;
  }

  void run(const Job& job) {
    std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (!caller.owns_lock() || workers_.empty()) {
      Team alone(1);
      job(alone);
      return;
    }
    Team team(static_cast<int>(workers_.size()) + 1);
    job_ = &job;
    team_ = &team;
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    job(team);
    for (int spins = 0; running_.load(std::memory_order_acquire) > 0; spins++) {
      spins < 4000 ? pause() : std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 3000;

  explicit Pool(int size) {
    for (int i = 1; i < size; i++) workers_.emplace_back([this] { work(); });
    for (auto& worker : workers_) worker.detach();
  }

  static int cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
    int count = static_cast<int>(std::thread::hardware_concurrency());
    return count > 0 ? count : 1;
  }

  void work() {
    for (long seen = 0;; seen++) {
      for (int i = 0; i < kSpins && epoch_.load(std::memory_order_acquire) == seen; i++) pause();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_relaxed);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      (*job_)(*team_);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex callers_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  std::atomic<long> epoch_{0};
  std::atomic<int> running_{0};
  const Job* job_ = nullptr;
  Team* team_ = nullptr;
};

}  // namespace pshare
