// Weights on their way from a file into panels, beside threads that serve.
//
// Everything runs in one thread of its own at a priority that the caller chooses. It never has
// Python's lock, nor any other that a step wants, so that it can be put aside at any time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__SSE4_2__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace pshare {

// Calls `job()`: in a thread of that many steps of lower priority, or in this one if there are none.
template <class Job>
void at_priority(int nice, Job job) {
#if defined(__linux__)
  if (nice > 0) {
    try {
      std::thread([&] {
        setpriority(PRIO_PROCESS, 0, nice);  // of the thread alone
        job();
      }).join();
      return;
    } catch (const std::system_error&) {  // no thread to be had
    }
  }
#endif
  job();
}

// A matrix [k, n] of numbers of `bytes` bytes, whose rows and columns lie any distances apart.
struct Strided {
  const char* data;
  long k, n, row_step, column_step;
};

// Packs a matrix, see gemm.h: `panel_step` is 2 where another matrix's panels come between. `zero` is
// the word of zeros, and what every word differs by from the numbers' own bits.
template <class Part>  // of a unit's word: uint32_t is one row, uint16_t has two, uint8_t four
void pack_panels(const Strided& m, long columns, long panel_step, uint32_t zero, uint32_t* out) {
  constexpr long unit = sizeof(uint32_t) / sizeof(Part);
  const Part* in = reinterpret_cast<const Part*>(m.data);
  long units = (m.k + unit - 1) / unit, panels = (m.n + columns - 1) / columns;
  auto at = [&](long row, long column) -> uint32_t {
    return row < m.k ? in[row * m.row_step + column * m.column_step] : 0;
  };
  auto word = [&](long u, long column) {
    uint32_t whole = 0;
    for (long i = 0; i < unit; i++) whole |= at(unit * u + i, column) << (i * 8 * sizeof(Part));
    return whole ^ zero;
  };
  for (long p = 0; p < panels; p++) {
    uint32_t* panel = out + p * panel_step * units * columns;
    long first = p * columns, count = std::min(columns, m.n - first);
    if (m.row_step == 1) {  // columns lie together
      for (long c = 0; c < count; c++) {
        for (long u = 0; u < units; u++) panel[u * columns + c] = word(u, first + c);
      }
    } else {
      for (long u = 0; u < units; u++) {
        for (long c = 0; c < count; c++) panel[u * columns + c] = word(u, first + c);
      }
    }
    if (count == columns) continue;
    for (long u = 0; u < units; u++) {
      std::fill(panel + u * columns + count, panel + (u + 1) * columns, zero);
    }
  }
}

// CRC-32C (Castagnoli), begun with `crc` of what came before.
inline uint32_t crc32c(uint32_t crc, const uint8_t* data, size_t size) {
  crc = ~crc;
#if defined(__SSE4_2__) || defined(__ARM_FEATURE_CRC32)
  for (; size >= 8; size -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
#if defined(__SSE4_2__)
    crc = static_cast<uint32_t>(_mm_crc32_u64(crc, word));
#else
    crc = __crc32cd(crc, word);
#endif
  }
#endif
  for (; size > 0; size--, data++) {
    crc ^= *data;
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

// As tensorstore converts: to the nearest, ties to even; a NaN keeps its upper half but for a bit.
inline uint16_t narrowed(uint32_t bits) {
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x20 : rounded);
}

// A tensor on disk, see convert/zarr.py: `chunks` pieces, each of `rows` times `run` numbers, which
// lie beside each other along the axis that the run begins with.
struct Stored {
  long rows, chunks, run;
  int bytes;  // of a number: 4 of float32, 2 of bfloat16
};

struct File {
  explicit File(const char* path) : descriptor(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
  ~File() {
    if (descriptor >= 0) close(descriptor);
  }
  bool read(void* out, size_t size, off_t offset) const {
    for (char* to = static_cast<char*>(out); size > 0;) {
      ssize_t got = pread(descriptor, to, size, offset);
      if (got <= 0) return false;
      to += got, offset += got, size -= got;
    }
    return true;
  }
  long size() const {
    struct stat about;
    return descriptor >= 0 && fstat(descriptor, &about) == 0 ? about.st_size : -1;
  }
  const int descriptor;
};

inline void convert(const uint8_t* in, int stored, long count, uint8_t* out, int wanted) {
  if (stored == wanted) {
    std::memcpy(out, in, count * stored);
  } else if (stored == 4) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(in);
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    for (long i = 0; i < count; i++) to[i] = narrowed(from[i]);
  } else {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(in);
    uint32_t* to = reinterpret_cast<uint32_t*>(out);
    for (long i = 0; i < count; i++) to[i] = static_cast<uint32_t>(from[i]) << 16;
  }
}

// One chunk; a piece that stays in the cache at a time. False if it is damaged.
inline bool read_chunk(const File& file, const Stored& t, long chunk, off_t offset, uint8_t* out,
                       int wanted, std::vector<uint8_t>& piece) {
  long total = t.rows * t.run, most = static_cast<long>(piece.size()) / t.bytes;
  uint32_t crc = 0, expected;
  for (long done = 0; done < total;) {
    long count = std::min(most, total - done);
    if (!file.read(piece.data(), count * t.bytes, offset + done * t.bytes)) return false;
    crc = crc32c(crc, piece.data(), count * t.bytes);
    for (long i = 0; i < count;) {
      long row = (done + i) / t.run, column = (done + i) % t.run;
      long together = std::min(t.run - column, count - i);
      long to = (row * t.chunks + chunk) * t.run + column;
      convert(piece.data() + i * t.bytes, t.bytes, together, out + to * wanted, wanted);
      i += together;
    }
    done += count;
  }
  return file.read(&expected, 4, offset + total * t.bytes) && crc == expected;
}

// A whole tensor, as numbers of `wanted` bytes. False if the file is not exactly what is written.
inline bool read_tensor(const char* path, const Stored& t, uint8_t* out, int wanted) {
  File file(path);
  const long chunk = t.rows * t.run * t.bytes, listed = t.chunks * 16;
  const long data = t.chunks * (chunk + 4);
  if (file.size() != data + listed + 4) return false;
  std::vector<uint64_t> index(2 * t.chunks);
  uint32_t expected;
  if (!file.read(index.data(), listed, data) || !file.read(&expected, 4, data + listed)) return false;
  if (crc32c(0, reinterpret_cast<const uint8_t*>(index.data()), listed) != expected) return false;
  std::vector<uint8_t> piece(1 << 18);
  for (long i = 0; i < t.chunks; i++) {
    uint64_t offset = index[2 * i], size = index[2 * i + 1];
    if (size != static_cast<uint64_t>(chunk) + 4 || offset > static_cast<uint64_t>(data)) return false;
    if (!read_chunk(file, t, i, static_cast<off_t>(offset), out, wanted, piece)) return false;
  }
  return true;
}

}  // namespace pshare
