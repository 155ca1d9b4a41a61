// Pages of 8 bits, widened for a call: all that its rows read, each page once, however many share it.
//
// What is computed then knows nothing of them. A call reads a byte a number and writes and reads what
// it computes in, which stays in the caches where contexts are short.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "fp8.h"
#include "norm.h"

namespace pshare {

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
    static thread_local Buffer<E> memory;
    wide_ = memory.get(static_cast<long>(used_.size()) * size_);
    rows_ = Rows{table_.data(), rows.start, rows.lens, rows.batch, rows.width};
  }

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
  E* wide_;
  Rows rows_{};
};

}  // namespace pshare
