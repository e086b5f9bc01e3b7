// SPDX-License-Identifier: Apache-2.0
// How a row of two float32 matrices is laid out over a cluster's shared memory. Host C++ without
// CUDA, so that every vocabulary can be tried where there is no GPU.
//
// A block holds a slice of both rows as `chunks` chunks, each split into a tile per warp, in a ring
// of `ring` chunks: ring - chunks chunks of the rows to come are on their way while a row is worked
// on.
#pragma once

#include <cstdint>

namespace opd {
namespace cuda {

constexpr int kMaxClusterBlocks = 16;
constexpr int kMaxRowWarps = 8;
constexpr int kOtherWarps = 2;
constexpr int kPass = 128;  // columns that a warp takes at once
constexpr int kBarrierBytes = 8;
constexpr int kExchangeKinds = 5;  // log-sum-exps, row sums, row sums again, terms, heads
// of the search for a head: bits of a bin's number; two sets of bins of 8 bytes and of their groups
constexpr int kClusterHeadBits = 10;
constexpr int kClusterHeadBytes = 2 * 8 * ((1 << kClusterHeadBits) + 32);

// The most blocks of a cluster by the text of OPD_CLUSTER_BLOCKS, nullptr or empty where it is not
// set: a switch to debug and to measure with. 0 keeps every call from the kernel; -1: not a number
// of blocks.
inline int cluster_blocks_of(const char* text) {
  if (text == nullptr || *text == '\0') return kMaxClusterBlocks;
  int value = 0;
  for (const char* at = text; *at != '\0'; ++at) {
    if (*at < '0' || *at > '9' || value > kMaxClusterBlocks) return -1;
    value = 10 * value + (*at - '0');
  }
  const bool is_power = (value & (value - 1)) == 0;
  return is_power && value <= kMaxClusterBlocks ? value : -1;
}

// What a divergence makes the blocks exchange, in doubles per block and row, and keep.
struct RowNeeds {
  int lse_values = 4, row_sum_values = 0, again_values = 0, term_values = 2;
  int functor_bytes = 0, head_bytes = 0;
  int values() const { return lse_values + row_sum_values + again_values + term_values; }
};

// Byte offsets into a block's shared memory; the ring begins at 0.
struct RowLayout {
  int chunk_barriers, exchange_barriers, partials, inbox, scalars, functor, head, end;
};

struct RowPlan {
  int cluster = 0;          // blocks that share a row
  int warps = 0;            // with tiles; one more adds up, and one loads
  int64_t slice = 0;        // columns of a block; the last blocks may have fewer or none
  int tile = 0;             // columns of a warp in a chunk; the last warps may have fewer or none
  int chunk = 0;            // columns
  int chunks = 0;           // of a row
  int ring = 0;             // chunks in shared memory
  RowLayout layout{};
  int threads() const { return 32 * (warps + kOtherWarps); }
  int shared_bytes() const { return layout.end; }
  double rows_on_chip() const { return static_cast<double>(ring) / chunks; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

constexpr int kScalarBytes = 128;  // of a row, for every warp of the block

inline RowLayout layout_of(int cluster, int warps, int chunk, int ring, const RowNeeds& needs) {
  RowLayout at{};
  at.chunk_barriers = ring * chunk * 8;
  at.exchange_barriers = at.chunk_barriers + kBarrierBytes * 2 * ring;
  at.partials = at.exchange_barriers + kBarrierBytes * 3 * kExchangeKinds;
  at.inbox = at.partials + 8 * needs.values() * warps;
  at.scalars = static_cast<int>(round_up(at.inbox + 8 * needs.values() * cluster, 16));
  at.functor = at.scalars + kScalarBytes;
  at.head = static_cast<int>(round_up(at.functor + needs.functor_bytes, 16));
  at.end = static_cast<int>(round_up(at.head + needs.head_bytes, 16));
  return at;
}

// Issue slots of the busiest of a multiprocessor's four schedulers, in passes of a warp over 128
// columns. A row and a chunk cost about a pass and half a pass beside their columns. A single warp
// leaves a scheduler idle now and then. With less than two rows on chip the loads of the next row
// wait for this one; a third row evens out what memory does.
inline double relative_cost(const RowPlan& plan) {
  const double busiest = static_cast<double>(ceil_div(plan.warps, 4));
  const double passes = static_cast<double>(ceil_div(plan.tile, kPass));
  const double row = busiest * (1.1 + plan.chunks * (0.6 + passes));
  const double rows = plan.rows_on_chip();
  const double waits = rows < 2 ? 0.04 + 0.5 * (2 - rows) : rows < 3 ? 0.04 * (3 - rows) : 0;
  const double idles = busiest < 2 ? 0.3 : 0;
  return row * (1 + waits) * (1 + idles);
}

// The best plan with this many blocks to a row; false if a row does not fit.
inline bool plan_rows(int64_t vocab_size, int64_t shared_bytes, int cluster, const RowNeeds& needs,
                      RowPlan* best) {
  constexpr int kMaxChunks = 8, kMaxRowsOnChip = 3;
  const int64_t slice = round_up(ceil_div(vocab_size, cluster), 8);
  // a row alone; also keeps what follows within int
  if (slice * 8 > shared_bytes) return false;
  bool found = false;
  for (int warps = 1; warps <= kMaxRowWarps; ++warps) {
    for (int chunks = 1; chunks <= kMaxChunks; ++chunks) {
      RowPlan plan;
      plan.cluster = cluster, plan.warps = warps, plan.slice = slice, plan.chunks = chunks;
      plan.chunk = static_cast<int>(round_up(ceil_div(slice, chunks), 4));
      // whole passes keep the lanes of a warp together
      const int64_t share = ceil_div(plan.chunk, warps);
      plan.tile = static_cast<int>(round_up(share, share > kPass ? kPass : 4));
      const int64_t fixed = layout_of(cluster, warps, 0, 0, needs).end + 16;
      const int64_t per_chunk = static_cast<int64_t>(plan.chunk) * 8 + 2 * kBarrierBytes;
      const int64_t ring = (shared_bytes - fixed) / per_chunk;
      const int most = kMaxRowsOnChip * chunks;
      if (ring < chunks) continue;
      plan.ring = ring < most ? static_cast<int>(ring) : most;
      plan.layout = layout_of(cluster, warps, plan.chunk, plan.ring, needs);
      const double gain = found ? relative_cost(*best) - relative_cost(plan) : 1;
      if (gain > 0 || (gain == 0 && plan.rows_on_chip() > best->rows_on_chip())) *best = plan;
      found = true;
    }
  }
  return found;
}

// The fewest blocks that keep two whole rows on chip, else those that keep most; false if a row
// does not fit into any cluster of at most `max_cluster` blocks.
inline bool choose_rows(int64_t vocab_size, int64_t shared_bytes, int max_cluster,
                        const RowNeeds& needs, RowPlan* best) {
  bool found = false;
  for (int cluster = 1; cluster <= max_cluster; cluster *= 2) {
    RowPlan plan;
    if (!plan_rows(vocab_size, shared_bytes, cluster, needs, &plan)) continue;
    if (!found || plan.rows_on_chip() > best->rows_on_chip()) *best = plan;
    found = true;
    if (best->rows_on_chip() >= 2) break;
  }
  return found;
}

}  // namespace cuda
}  // namespace opd
