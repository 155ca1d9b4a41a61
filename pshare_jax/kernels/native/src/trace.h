// What the loops of calls cost, iteration by iteration: for `bench threads`.
//
// While a trace is kept, calls run in their caller's thread alone, but cut their loops as they would
// for a team of another size. So what such a team would have to do is not described anywhere else.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

namespace pshare {

class Trace {
 public:
  // Times are in nanoseconds, of any start. `count`: iterations of a loop, whose own entries follow;
  // kIteration; or kCall, after all that it contains.
  struct Entry {
    int64_t begin, end;
    int32_t stage, count;
  };
  static constexpr int32_t kIteration = -1, kCall = -2;

  explicit Trace(int threads) : threads(threads) { entries.reserve(1 << 16); }

  static int64_t now() {
    auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
  }

  template <class Body>
  void loop(const char* stage, long count, Body& body) {
    int32_t number = number_of(stage);
    size_t whole = entries.size();
    int64_t begin = now(), from = begin;
    entries.push_back({begin, begin, number, static_cast<int32_t>(count)});
    for (long i = 0; i < count; i++) {
      body(i);
      int64_t to = now();
      entries.push_back({from, to, number, kIteration});
      from = to;
    }
    entries[whole].end = from;
  }

  void called(int64_t begin) { entries.push_back({begin, now(), 0, kCall}); }

  const int threads;
  std::vector<Entry> entries;
  std::vector<const char*> stages;

 private:
  int32_t number_of(const char* stage) {
    for (size_t i = 0; i < stages.size(); i++) {
      if (std::strcmp(stages[i], stage) == 0) return static_cast<int32_t>(i);
    }
    stages.push_back(stage);
    return static_cast<int32_t>(stages.size()) - 1;
  }
};

}  // namespace pshare
