// What Python calls by ctypes, with host memory and without XLA.

#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kv_codec.h"
#include "loading.h"
#include "small_pages.h"
#include "threads.h"
#include "tile_check.h"

using namespace pshare;

// Asks for large pages where the memory of an array lies: weights and KV are read at a third more
// bytes a second from them. Advice only; what lies in the same large page as an end of the array
// is moved with it, where all of that page is there.
extern "C" void pshare_large_pages(char* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t large = 2 << 20;
  constexpr int collapse = 25;  // MADV_COLLAPSE, of Linux 6.1
  auto advise = [](uintptr_t first, uintptr_t last) {
    void* start = reinterpret_cast<void*>(first);
    if (first < last && madvise(start, last - first, MADV_HUGEPAGE) == 0) {
      madvise(start, last - first, collapse);
    }
  };
  uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  uintptr_t first = (begin + large - 1) / large * large, last = end / large * large;
  // In one call, since each of them makes every core empty its lists of pages.
  advise(first, last);
  if (begin < first) advise(first - large, first);
  if (last < end && last >= first) advise(last, last + large);
#else
  (void)memory;
  (void)bytes;
#endif
}

// One page's record, see kv_codec.h; called with the memory of host arrays, not by XLA.
extern "C" long pshare_kv_encode(int planes, const uint16_t* x, long layers, long stride,
                                 long values, long block, long channels, const uint8_t* book,
                                 uint8_t* out, long capacity) {
  CodedPage page{layers, stride, values, block, channels, book};
  return planes == 3 ? encode_page<3>(x, page, out, capacity)
                     : encode_page<4>(x, page, out, capacity);
}

extern "C" int pshare_kv_decode(int planes, const uint8_t* in, long length, long layers,
                                long stride, long values, long block, long channels,
                                const uint8_t* book, uint16_t* x) {
  CodedPage page{layers, stride, values, block, channels, book};
  return planes == 3 ? decode_page<3>(in, length, page, x) : decode_page<4>(in, length, page, x);
}

// A matrix into panels, see loading.h; `bytes` a number, `nice` steps below the caller's priority.
extern "C" void pshare_pack(const char* data, long k, long n, long row_step, long column_step,
                            int bytes, long panel_step, uint32_t* out, uint32_t zero, int nice) {
  Strided matrix{data, k, n, row_step, column_step};
  at_priority(nice, [&] {
    if (bytes == 1) return pack_panels<uint8_t>(matrix, kPanel, panel_step, zero, out);
    if (bytes == 2) return pack_panels<uint16_t>(matrix, kPanel, panel_step, zero, out);
    pack_panels<uint32_t>(matrix, kPanel, panel_step, zero, out);
  });
}

// A tensor of a checkpoint, see loading.h. 0 if the file is not exactly what is written.
extern "C" int pshare_read_tensor(const char* path, long rows, long chunks, long run, int bytes,
                                  uint8_t* out, int wanted, int nice) {
  bool whole = false;
  at_priority(nice, [&] { whole = read_tensor(path, {rows, chunks, run, bytes}, out, wanted); });
  return whole;
}

// Bytes in which pages of 8 bits are widened, see small_pages.h.
extern "C" long pshare_widened_bytes() { return WideMemory::instance().bytes(); }

// Columns of a panel of a packed matrix: what the Python side packs by.
extern "C" int pshare_panel_columns() { return kPanel; }

// Threads of the team.
extern "C" int pshare_threads() { return Pool::instance().size(); }

extern "C" void pshare_limit_threads(int threads) { Pool::instance().limit(threads); }

// Loops of `count` iterations of `spins` pauses each, `loops` times: what sharing out costs.
extern "C" void pshare_share_out(long loops, long count, long spins) {
  Pool::instance().run([&](Team& team) {
    for (long n = 0; n < loops; n++) {
      team.loop(count, [&](long) {
        for (long i = 0; i < spins; i++) pshare::pause();
      });
    }
  });
}

// See trace.h. At the end entries are copied to `out`, as many as it has room for, and names of stages, each
// followed by a newline, to `stages`; the answer is their number, or -1 if no trace was begun.
extern "C" void pshare_start_trace(int threads) { Pool::instance().start_trace(threads); }
extern "C" long pshare_trace_length() { return Pool::instance().trace_length(); }
extern "C" long pshare_end_trace(Trace::Entry* out, long capacity, char* stages, long length) {
  std::unique_ptr<Trace> trace = Pool::instance().end_trace();
  if (trace == nullptr) return -1;
  std::string names;
  for (const char* stage : trace->stages) names += std::string(stage) + "\n";
  long count = static_cast<long>(trace->entries.size());
  std::copy_n(trace->entries.begin(), std::min(count, capacity), out);
  std::snprintf(stages, length, "%s", names.c_str());
  return count;
}

// Decides what multiplies bfloat16, before anything does; see tile_check.h. Once for good.
extern "C" int pshare_start_tiles(int wanted) {
  static const Multiplier decided = start_tiles(wanted != 0);
  return static_cast<int>(decided);
}
