// SPDX-License-Identifier: Apache-2.0
// The nodes of the edit graph of two streams of symbols that every cheapest path goes through.
//
// A byte may be inserted, deleted or replaced by another byte, a special symbol inserted or deleted,
// each at a cost of 1. Costs do not decrease along a diagonal i - j = k of the graph, so that those
// of all nodes of a cost of at most d are known from how far each diagonal gets with d edits (E. W.
// Myers, An O(ND) difference algorithm, 1986): time O(n + m + D (n + m) / 8 + D^2) at worst, usually
// O(n + m + D^2), and memory O(n + m + D^2) for a distance of D.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "opd/opd.h"

namespace opd {
namespace align_tokens {

// A byte, or kSpecial with the roles of a special token, or with kEmpty for a token of no bytes.
using Symbol = uint16_t;
constexpr Symbol kSpecial = 256;
constexpr Symbol kEmpty = 32;

// The same byte, or special tokens with a role in common. unk stands where unk stands, but for two
// texts that nobody knows: it matches, and is never aligned.
inline bool match(Symbol x, Symbol y) { return x == y || (x & y) > kSpecial; }
inline bool is_same(Symbol x, Symbol y) {
  constexpr Symbol kKnown = static_cast<Symbol>(~OPD_ROLE_UNK);
  return x < kSpecial ? x == y : (x & y & kKnown) > kSpecial;
}

struct Stretch {
  const Symbol* symbols;
  int32_t count;
};

class SharedNodes {
 public:
  // emit(i, j) for each node, from (0, 0) to the end of both. A distance above max_edits, where both
  // streams have symbols: what they begin with and end with, and nothing between.
  template <class Emit>
  void find(Stretch x, Stretch y, int32_t max_edits, Emit&& emit) {
    x_ = x;
    y_ = y;
    if (x.count == 0 || y.count == 0) {
      // one path
      for (int32_t i = 0; i < x.count; ++i) emit(i, 0);
      for (int32_t j = 0; j < y.count; ++j) emit(0, j);
      return emit(x.count, y.count);
    }
    const int32_t distance = spread<false>(max_edits, &reached_);
    if (distance < 0) return trimmed(emit);
    spread<true>(distance, &reached_back_);
    mark(distance);
    for (size_t level = 0; level < cover_.size(); ++level) {
      const int32_t i = node_[level];
      if (cover_[level] == 1 && i >= 0) emit(i, static_cast<int32_t>(level) - i);
    }
  }

 private:
  static constexpr int32_t kNone = -1;

  // where diagonal k's furthest point with d edits is kept, -d <= k <= d
  static size_t slot(int32_t d, int32_t k) {
    return static_cast<size_t>(d) * static_cast<size_t>(d) + static_cast<size_t>(k + d);
  }

  template <bool kBack>
  Symbol x_at(int32_t i) const {
    return x_.symbols[kBack ? x_.count - 1 - i : i];
  }
  template <bool kBack>
  Symbol y_at(int32_t j) const {
    return y_.symbols[kBack ? y_.count - 1 - j : j];
  }

  // from node (i, i - k) along matches
  template <bool kBack>
  int32_t slide(int32_t i, int32_t k) const {
    constexpr int32_t kStep = 4;
    const int32_t end = std::min(x_.count, y_.count + k);
    while (i < end) {
      if (end - i >= kStep) {
        const Symbol* x = x_.symbols + (kBack ? x_.count - i - kStep : i);
        const Symbol* y = y_.symbols + (kBack ? y_.count - (i - k) - kStep : i - k);
        if (std::memcmp(x, y, kStep * sizeof(Symbol)) == 0) {
          i += kStep;
          continue;
        }
      }
      if (!match(x_at<kBack>(i), y_at<kBack>(i - k))) break;
      ++i;
    }
    return i;
  }

  static bool may_replace(Symbol x, Symbol y) { return x < kSpecial && y < kSpecial; }

  // Fills the furthest i of each diagonal for 0, 1, ... edits; returns how many the end needs, or
  // kNone if more than max_edits. Backwards, x and y are read from their ends.
  template <bool kBack>
  int32_t spread(int32_t max_edits, std::vector<int32_t>* reached) {
    const int32_t n = x_.count, m = y_.count, last = n - m;
    reached->clear();
    if (std::abs(last) > max_edits) return kNone;
    for (int32_t d = 0; d <= max_edits; ++d) {
      reached->resize(slot(d, d) + 1, kNone);
      for (int32_t k = std::max(-d, -m); k <= std::min(d, n); ++k) {
        int32_t best = d == 0 ? 0 : kNone;
        const auto before = [&](int32_t diagonal) {
          return std::abs(diagonal) < d ? (*reached)[slot(d - 1, diagonal)] : kNone;
        };
        if (const int32_t i = before(k); i != kNone) {
          const bool replaced =
              i < n && i - k < m && may_replace(x_at<kBack>(i), y_at<kBack>(i - k));
          best = i + (replaced ? 1 : 0);
        }
        if (const int32_t i = before(k - 1); i != kNone && i < n) best = std::max(best, i + 1);
        if (const int32_t i = before(k + 1); i != kNone && i - k <= m) best = std::max(best, i);
        if (best != kNone) best = slide<kBack>(best, k);
        (*reached)[slot(d, k)] = best;
      }
      if (std::abs(last) <= d && (*reached)[slot(d, last)] == n) return d;
    }
    return kNone;
  }

  // first i of diagonal k from which the end is `edits` away or less; beyond the end if there is none
  int32_t first_within(int32_t edits, int32_t k) const {
    const int32_t back = x_.count - y_.count - k;
    if (std::abs(back) > edits) return x_.count + 1;
    const int32_t i = reached_back_[slot(edits, back)];
    return i == kNone ? x_.count + 1 : x_.count - i;
  }

  // last i of diagonal k that `edits` reach
  int32_t last_within(int32_t edits, int32_t k) const {
    return std::abs(k) > edits ? kNone : reached_[slot(edits, k)];
  }

  // For each level i + j how many nodes of cheapest paths are on it and how many of their diagonal
  // edges jump over it, of which more than one are all the same. A node is on every path if nothing
  // else covers its level.
  void mark(int32_t distance) {
    const int32_t n = x_.count, m = y_.count;
    const size_t levels = static_cast<size_t>(n) + static_cast<size_t>(m) + 1;
    cover_.assign(levels, 0);
    node_.assign(levels, kNone);
    const auto cover = [&](int32_t level) {
      uint8_t& count = cover_[static_cast<size_t>(level)];
      count = static_cast<uint8_t>(std::min(count + 1, 2));
    };
    for (int32_t d = 0; d <= distance; ++d) {
      for (int32_t k = std::max(-d, -m); k <= std::min(d, n); ++k) {
        const int32_t end = last_within(d, k);
        if (end == kNone) continue;
        const int32_t begin = std::max({last_within(d - 1, k) + 1, std::max(k, 0),
                                        first_within(distance - d, k)});
        for (int32_t i = begin; i <= end; ++i) {
          cover(2 * i - k);
          node_[static_cast<size_t>(2 * i - k)] = i;
          if (i < end && match(x_.symbols[i], y_.symbols[i - k])) cover(2 * i - k + 1);
        }
        // a replacement leads from the last node of d edits to the first of d + 1
        if (begin <= end && end < n && end - k < m && d < distance &&
            may_replace(x_.symbols[end], y_.symbols[end - k]) &&
            first_within(distance - d - 1, k) <= end + 1) {
          cover(2 * end - k + 1);
        }
      }
    }
  }

  template <class Emit>
  void trimmed(Emit&& emit) const {
    const int32_t n = x_.count, m = y_.count, both = std::min(n, m);
    int32_t front = 0, back = 0;
    while (front < both && match(x_.symbols[front], y_.symbols[front])) ++front;
    while (back < both - front && match(x_.symbols[n - 1 - back], y_.symbols[m - 1 - back])) ++back;
    for (int32_t i = 0; i <= front; ++i) emit(i, i);
    for (int32_t i = back; i >= 0; --i) emit(n - i, m - i);
  }

  Stretch x_{}, y_{};
  std::vector<int32_t> reached_, reached_back_, node_;
  std::vector<uint8_t> cover_;
};

}  // namespace align_tokens
}  // namespace opd
