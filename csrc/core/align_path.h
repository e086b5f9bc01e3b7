// SPDX-License-Identifier: Apache-2.0
// The nodes of the edit graph of two streams of symbols that every cheapest path goes through.
//
// A byte may be inserted, deleted or replaced by another byte, a special symbol inserted or deleted,
// each at a cost of 1. Costs do not decrease along a diagonal i - j = k of the graph, so that those
// of all nodes of a cost of at most d are known from how far each diagonal gets with d edits (E. W.
// Myers, An O(ND) difference algorithm, 1986): time O(n + m + D (n + m) / 8 + D^2) at worst, usually
// O(n + m + D^2), and memory O(n + m + D^2) for a distance of D. Streams that are further apart than
// some D are taken in pieces.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
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
  // emit(i, j) for each node, from (0, 0) to the end of both. Streams of a distance above max_edits
  // are cut: see walk. Where it finds no way from the front, it tries from the end; between the two
  // only what both begin with and end with is left.
  template <class Emit>
  void find(Stretch x, Stretch y, int32_t max_edits, Emit&& emit) {
    emit(0, 0);
    const Node front = walk(x, y, max_edits, emit);
    const Node end{x.count, y.count};
    if (front.i == end.i && front.j == end.j) return;
    back_.assign(1, end);
    reverse(x, front.i, &x_back_);
    reverse(y, front.j, &y_back_);
    walk({x_back_.data(), end.i - front.i}, {y_back_.data(), end.j - front.j}, max_edits,
         [&](int32_t i, int32_t j) { back_.push_back({end.i - i, end.j - j}); });
    trimmed(x, y, front, back_.back(), emit);
    for (size_t k = back_.size() - 1; k-- > 0;) emit(back_[k].i, back_[k].j);
  }

 private:
  struct Node {
    int32_t i, j;
  };
  static constexpr int32_t kNone = -1;

  static Stretch behind(Stretch stretch, int32_t begin) {
    return {stretch.symbols + begin, stretch.count - begin};
  }

  static void reverse(Stretch stretch, int32_t begin, std::vector<Symbol>* out) {
    out->assign(std::make_reverse_iterator(stretch.symbols + stretch.count),
                std::make_reverse_iterator(stretch.symbols + begin));
  }

  // emit(i, j) for the nodes that follow on (0, 0); returns the last of them.
  //
  // Where the end is not within max_edits, the nodes are those of the cheapest paths to what those
  // edits get furthest to (if that is several nodes, to the two on the outermost diagonals). The
  // first half of the way is kept, of which what lies ahead can no longer change much, and what is
  // behind is another problem. Less than a quarter is no way: every problem takes a share of the
  // streams, and all of them O((n + m) D) for D = max_edits.
  template <class Emit>
  Node walk(Stretch x, Stretch y, int32_t max_edits, Emit&& emit) {
    Node here{0, 0};
    for (;;) {
      x_ = behind(x, here.i);
      y_ = behind(y, here.j);
      const Node rest{x_.count, y_.count};
      if (rest.i == 0 || rest.j == 0) {
        // one path
        for (int32_t k = 1; k <= rest.i + rest.j; ++k) {
          emit(here.i + std::min(k, rest.i), here.j + std::min(k, rest.j));
        }
        return {x.count, y.count};
      }
      const int32_t distance = spread<false>(max_edits, &reached_);
      if (distance >= 0) {
        mark(distance, &nodes_);
        for (size_t k = 1; k < nodes_.size(); ++k) emit(here.i + nodes_[k].i, here.j + nodes_[k].j);
        return {x.count, y.count};
      }
      const int64_t length = mark_furthest(max_edits);
      Node last{0, 0};
      for (size_t k = 1; k < nodes_.size(); ++k) {
        if (2 * (int64_t{nodes_[k].i} + nodes_[k].j) > length) break;
        last = nodes_[k];
        emit(here.i + last.i, here.j + last.j);
      }
      const int64_t level = int64_t{last.i} + last.j;
      here = {here.i + last.i, here.j + last.j};
      if (level == 0 || 4 * level < length) return here;
    }
  }

  // Leaves in nodes_ those of all cheapest paths to the furthest that so many edits reach; returns
  // its level i + j.
  int64_t mark_furthest(int32_t max_edits) {
    int64_t length = 0;
    Node ends[2]{};
    for (int32_t k = std::max(-max_edits, -y_.count); k <= std::min(max_edits, x_.count); ++k) {
      const int32_t i = last_within(max_edits, k);
      const int64_t level = 2 * int64_t{i} - k;
      if (i == kNone || level < length) continue;
      ends[1] = {i, i - k};
      if (level > length) ends[0] = ends[1];
      length = level;
    }
    mark_to(ends[0], max_edits, &nodes_);
    if (ends[0].i != ends[1].i) {
      mark_to(ends[1], max_edits, &others_);
      const auto is_before = [](Node a, Node b) {
        return a.i != b.i ? a.i < b.i : a.j < b.j;
      };
      std::vector<Node> both;
      std::set_intersection(nodes_.begin(), nodes_.end(), others_.begin(), others_.end(),
                            std::back_inserter(both), is_before);
      nodes_.swap(both);
    }
    return length;
  }

  void mark_to(Node end, int32_t max_edits, std::vector<Node>* nodes) {
    const Stretch x = x_, y = y_;
    x_.count = end.i;
    y_.count = end.j;
    mark(spread<false>(max_edits, &reached_), nodes);
    x_ = x;
    y_ = y;
  }

  // How far each diagonal gets, -d <= k <= d, by d: a row each, so that growing copies nothing.
  using Reached = std::vector<std::vector<int32_t>>;

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

  static int32_t at(const Reached& reached, int32_t d, int32_t k) {
    return reached[static_cast<size_t>(d)][static_cast<size_t>(k + d)];
  }

  static bool may_replace(Symbol x, Symbol y) { return x < kSpecial && y < kSpecial; }

  // Fills the furthest i of each diagonal for 0, 1, ... edits; returns how many the end needs, or
  // kNone if more than max_edits. Backwards, x and y are read from their ends.
  template <bool kBack>
  int32_t spread(int32_t max_edits, Reached* reached) {
    const int32_t n = x_.count, m = y_.count, last = n - m;
    for (int32_t d = 0; d <= max_edits; ++d) {
      if (reached->size() == static_cast<size_t>(d)) {
        reached->emplace_back(2 * static_cast<size_t>(d) + 1);
      }
      std::vector<int32_t>& row = (*reached)[static_cast<size_t>(d)];
      std::fill(row.begin(), row.end(), kNone);
      for (int32_t k = std::max(-d, -m); k <= std::min(d, n); ++k) {
        int32_t best = d == 0 ? 0 : kNone;
        const auto before = [&](int32_t diagonal) {
          return std::abs(diagonal) < d ? at(*reached, d - 1, diagonal) : kNone;
        };
        if (const int32_t i = before(k); i != kNone) {
          const bool replaced =
              i < n && i - k < m && may_replace(x_at<kBack>(i), y_at<kBack>(i - k));
          best = i + (replaced ? 1 : 0);
        }
        if (const int32_t i = before(k - 1); i != kNone && i < n) best = std::max(best, i + 1);
        if (const int32_t i = before(k + 1); i != kNone && i - k <= m) best = std::max(best, i);
        if (best != kNone) best = slide<kBack>(best, k);
        row[static_cast<size_t>(k + d)] = best;
      }
      if (std::abs(last) <= d && at(*reached, d, last) == n) return d;
    }
    return kNone;
  }

  // first i of diagonal k from which the end is `edits` away or less; beyond the end if there is none
  int32_t first_within(int32_t edits, int32_t k) const {
    const int32_t back = x_.count - y_.count - k;
    if (std::abs(back) > edits) return x_.count + 1;
    const int32_t i = at(reached_back_, edits, back);
    return i == kNone ? x_.count + 1 : x_.count - i;
  }

  // last i of diagonal k that `edits` reach
  int32_t last_within(int32_t edits, int32_t k) const {
    return std::abs(k) > edits ? kNone : at(reached_, edits, k);
  }

  // The nodes of every cheapest path to the end, which reached_ has come to.
  //
  // For each level i + j how many nodes of cheapest paths are on it and how many of their diagonal
  // edges jump over it, of which more than one are all the same. A node is on every path if nothing
  // else covers its level.
  void mark(int32_t distance, std::vector<Node>* nodes) {
    spread<true>(distance, &reached_back_);
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
    nodes->clear();
    for (size_t level = 0; level < levels; ++level) {
      const int32_t i = node_[level];
      if (cover_[level] == 1 && i >= 0) nodes->push_back({i, static_cast<int32_t>(level) - i});
    }
  }

  // The nodes behind `begin` up to `end`, of what both streams begin with there, and end with.
  template <class Emit>
  static void trimmed(Stretch x, Stretch y, Node begin, Node end, Emit&& emit) {
    const int32_t both = std::min(end.i - begin.i, end.j - begin.j);
    int32_t front = 0, back = 0;
    while (front < both && match(x.symbols[begin.i + front], y.symbols[begin.j + front])) {
      ++front;
      emit(begin.i + front, begin.j + front);
    }
    while (back < both - front &&
           match(x.symbols[end.i - 1 - back], y.symbols[end.j - 1 - back])) {
      ++back;
    }
    const bool is_empty = front == end.i - begin.i && front == end.j - begin.j;
    for (; !is_empty && back >= 0; --back) emit(end.i - back, end.j - back);
  }

  Stretch x_{}, y_{};
  Reached reached_, reached_back_;
  std::vector<int32_t> node_;
  std::vector<uint8_t> cover_;
  std::vector<Node> nodes_, others_, back_;
  std::vector<Symbol> x_back_, y_back_;
};

}  // namespace align_tokens
}  // namespace opd
