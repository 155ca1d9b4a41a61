// Pages of 8 bits, widened for a call: all that its rows read, each page once, however many share it.
//
// What is computed then knows nothing of them. A call reads a byte a number and writes and reads what
// it computes in, which stays in the caches where contexts are short.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "attention.h"
#include "fp8.h"

namespace pshare {

// The memory that pages are widened in, of all threads: a block for each call that runs at once. A
// block is at most a quarter larger than a call has needed, and one that no call has needed half of
// for a while is given back.
class WideMemory {
 public:
  struct Block {
    void* data = nullptr;
    long size = 0, needed = 0;  // needed: number of the call that last took half of it
  };
  static constexpr long kCalls = 1 << 14;  // a while: hundreds of steps, which are a call a layer
  static constexpr long kAlignment = 64;

  // Never destroyed: threads may outlive static objects when the process exits.
  static WideMemory& instance() {
    static WideMemory* memory = new WideMemory;
    return *memory;
  }

  Block take(long size) {
    std::lock_guard<std::mutex> lock(mutex_);
    calls_++;
    drop([&](const Block& block) { return block.needed + kCalls < calls_; });
    auto fits = [&](const Block& block) { return block.size >= size; };
    auto found = std::find_if(free_.begin(), free_.end(), fits);  // the smallest one
    if (found == free_.end()) {
      // The largest one has to grow; what is in it is nobody's.
      drop([&, largest = free_.empty() ? 0 : free_.back().size](const Block& block) {
        return block.size == largest;
      });
      long rounded = round_up(size + size / 4 + 1, kAlignment);
      void* data = std::aligned_alloc(kAlignment, rounded);
      if (data == nullptr) throw std::bad_alloc();
      bytes_ += rounded;
      return {data, rounded, calls_};
    }
    Block block = *found;
    free_.erase(found);
    if (2 * size >= block.size) block.needed = calls_;
    return block;
  }

  void give(Block block) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto larger = [](const Block& a, const Block& b) { return a.size < b.size; };
    free_.insert(std::upper_bound(free_.begin(), free_.end(), block, larger), block);
  }

  long bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

 private:
  template <class Which>
  void drop(Which which) {
    auto stays = [&](const Block& block) { return !which(block); };
    auto kept = std::stable_partition(free_.begin(), free_.end(), stays);
    for (auto block = kept; block != free_.end(); block++) {
      bytes_ -= block->size;
      std::free(block->data);
    }
    free_.erase(kept, free_.end());
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // by size
  long calls_ = 0, bytes_ = 0;
};

template <class E>
class WidenedPages {
 public:
  // The rows have been looked at by `problem`.
  WidenedPages(const fp8* pages, const Rows& rows, const Geometry& g)
      : pages_(pages), size_(2 * g.kv_heads * g.page_size * g.head_dim),
        table_(rows.batch * rows.width, 0) {
    auto each = [&](auto visit) {
      for (long b = 0; b < rows.batch; b++) {
        if (rows.lens[b] <= 0) continue;
        long end = rows.start[b] + rows.lens[b];
        long first = g.window > 0 ? std::max<long>(rows.start[b] - g.window + 1, 0) : 0;
        for (long n = first / g.page_size; n * g.page_size < end; n++) visit(b * rows.width + n);
      }
    };
    each([&](long at) { used_.push_back(rows.table[at]); });
    std::sort(used_.begin(), used_.end());
    used_.erase(std::unique(used_.begin(), used_.end()), used_.end());
    each([&](long at) {
      auto found = std::lower_bound(used_.begin(), used_.end(), rows.table[at]);
      table_[at] = static_cast<int32_t>(found - used_.begin());
    });
    block_ = WideMemory::instance().take(static_cast<long>(used_.size() * sizeof(E)) * size_);
    wide_ = static_cast<E*>(block_.data);
    rows_ = Rows{table_.data(), rows.start, rows.lens, rows.batch, rows.width};
  }

  ~WidenedPages() { WideMemory::instance().give(block_); }
  WidenedPages(const WidenedPages&) = delete;
  WidenedPages& operator=(const WidenedPages&) = delete;

  // After the call's own tokens have been written.
  void widen(Team& team) {
    team.at("pages widened");
    team.loop(static_cast<long>(used_.size()), [&](long i) {
      convert(pages_ + used_[i] * size_, wide_ + i * size_, size_);
    });
  }

  const E* pages() const { return wide_; }
  const Rows& rows() const { return rows_; }

 private:
  const fp8* pages_;
  const long size_;  // numbers of a page
  std::vector<int32_t> table_, used_;
  WideMemory::Block block_;
  E* wide_;
  Rows rows_{};
};

}  // namespace pshare
