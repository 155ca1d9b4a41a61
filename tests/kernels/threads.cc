// Loops under test, for test_threads.py: every iteration once, whatever the team and its callers.

#include <cstdio>
#include <thread>

#include "threads.h"

using namespace pshare;

static std::atomic<long> faults{0};

// Loops of all lengths, whose iterations are unlike; memory that is not atomic tells whether what an
// iteration did is seen after its loop.
static void work(long loops, unsigned seed) {
  for (long n = 0; n < loops; n++) {
    seed = seed * 1664525 + 1013904223;
    long count = (seed >> 16) % 300;
    std::vector<long> times(count, 0), in_rows(count, 0);
    Pool::instance().run([&](Team& team) {
      team.loop(count, [&](long i) {
        for (long s = 0; s < (i * 7919 + n) % 40; s++) pause();
        times[i]++;
      });
      team.rows(count, [&](long i) { in_rows[i] += times[i]; });
    });
    for (long i = 0; i < count; i++) faults += times[i] != 1 || in_rows[i] != 1;
  }
}

int main(int, char** argv) {
  long loops = std::atol(argv[1]);
  std::vector<std::thread> callers;
  work(loops, 1);
  for (unsigned i = 0; i < 3; i++) callers.emplace_back(work, loops, i);
  for (std::thread& caller : callers) caller.join();
  Pool::instance().limit(2);
  work(loops, 9);
  std::printf("%d threads, %ld faults\n", Pool::instance().size(), faults.load());
}
