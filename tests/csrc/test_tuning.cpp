// SPDX-License-Identifier: Apache-2.0
// Plans of the cluster kernel for every size of vocabulary: fit, cover, prefetch.
#include "tuning.h"

#include <initializer_list>
#include <string>

#include "expect.h"

namespace {

using namespace opd::cuda;

constexpr int64_t kHopperShared = 227 * 1024;

RowNeeds make_needs(bool with_statistics, int row_sums) {
  RowNeeds needs;
  if (with_statistics) needs.lse_values = needs.term_values = 6;
  needs.row_sum_values = row_sums;
  needs.functor_bytes = row_sums > 0 ? 120 : 0;
  return needs;
}

// Walks the blocks, chunks and warps as the kernel does: each column exactly once, in order.
bool covers_each_column(const RowPlan& plan, int64_t vocab_size) {
  int64_t covered = 0;
  for (int block = 0; block < plan.cluster; ++block) {
    const int64_t begin = block * plan.slice;
    const int64_t end = begin + plan.slice < vocab_size ? begin + plan.slice : vocab_size;
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      for (int warp = 0; warp < plan.warps; ++warp) {
        const int64_t start = begin + static_cast<int64_t>(chunk) * plan.chunk;
        const int64_t stop = start + plan.chunk < end ? start + plan.chunk : end;
        const int64_t first = start + warp * plan.tile;
        const int64_t left = stop - first;
        const int64_t count = left <= 0 ? 0 : left < plan.tile ? left : plan.tile;
        if (count == 0) continue;
        if (first != covered || first % 4 != 0) return false;
        covered += count;
      }
    }
  }
  return covered == vocab_size;
}

void check_plan(const RowPlan& plan, int64_t vocab_size, int64_t shared_bytes, int max_cluster) {
  expect::that(plan.shared_bytes() <= shared_bytes, "a plan fits in shared memory");
  expect::that(plan.cluster >= 1 && plan.cluster <= max_cluster, "a cluster of allowed size");
  expect::that(plan.ring >= plan.chunks, "a whole row is on chip");
  expect::that(plan.threads() <= 32 * (kMaxRowWarps + kOtherWarps), "as many threads as allowed");
  expect::that(plan.tile % 4 == 0, "tiles of whole 16 bytes");
  expect::that(plan.layout.chunk_barriers % 8 == 0 && plan.layout.scalars % 16 == 0, "alignment");
  expect::that(covers_each_column(plan, vocab_size), "each column belongs to one tile");
}

void check_vocabularies() {
  for (const bool with_statistics : {false, true}) {
    for (const int row_sums : {0, 3}) {
      const RowNeeds needs = make_needs(with_statistics, row_sums);
      for (int64_t vocab_size = 1; vocab_size <= 300000; vocab_size += 997) {
        RowPlan plan;
        if (!choose_rows(vocab_size, kHopperShared, kMaxClusterBlocks, needs, &plan)) {
          expect::that(false, "every vocabulary up to 300,000 has a plan");
          continue;
        }
        check_plan(plan, vocab_size, kHopperShared, kMaxClusterBlocks);
        // no smaller cluster keeps two rows, and the next larger one does not either
        for (int cluster = 1; cluster < plan.cluster; cluster *= 2) {
          RowPlan other;
          const bool fits = plan_rows(vocab_size, kHopperShared, cluster, needs, &other);
          expect::that(!fits || other.rows_on_chip() < 2, "the smallest cluster that prefetches");
        }
        expect::that(plan.rows_on_chip() >= 2 || plan.cluster == kMaxClusterBlocks,
                     "the largest prefetch");
      }
    }
  }
}

// What the common vocabularies get: the next row whole, or most of it, while a row is worked on.
void check_common_vocabularies() {
  const auto rows = [](int64_t vocab_size) {
    RowPlan plan;
    choose_rows(vocab_size, kHopperShared, kMaxClusterBlocks, make_needs(false, 0), &plan);
    return plan.rows_on_chip();
  };
  expect::that(rows(32000) >= 3, "three rows of 32,000 columns");
  expect::that(rows(128256) >= 3, "three rows of 128,256 columns");
  expect::that(rows(151936) >= 3, "three rows of 151,936 columns");
  expect::that(rows(262144) >= 1.75, "seven quarters of a row of 262,144 columns");
}

void check_limits() {
  RowPlan plan;
  const RowNeeds needs = make_needs(false, 0);
  expect::that(!choose_rows(500000, kHopperShared, kMaxClusterBlocks, needs, &plan),
               "what does not fit is refused");
  expect::that(!choose_rows(int64_t{1} << 40, kHopperShared, kMaxClusterBlocks, needs, &plan),
               "... however large");
  expect::that(!choose_rows(151936, kHopperShared, 4, needs, &plan), "... in small clusters");
  expect::that(choose_rows(20000, 30 * 1024, kMaxClusterBlocks, needs, &plan), "little memory");
  check_plan(plan, 20000, 30 * 1024, kMaxClusterBlocks);
  expect::that(plan.cluster == 16, "little memory takes a large cluster");
  expect::that(!choose_rows(1, 256, kMaxClusterBlocks, needs, &plan), "no memory to speak of");
  expect::that(choose_rows(1000, kHopperShared, kMaxClusterBlocks, needs, &plan), "a short row");
  expect::that(plan.cluster == 1, "a short row stays in one block");
}

// OPD_CLUSTER_BLOCKS.
void check_switch() {
  for (const int blocks : {0, 1, 2, 4, 8, 16}) {
    expect::that(cluster_blocks_of(std::to_string(blocks).c_str()) == blocks, "blocks as asked for");
  }
  for (const char* const unset : {static_cast<const char*>(nullptr), ""}) {
    expect::that(cluster_blocks_of(unset) == kMaxClusterBlocks, "as many as there may be");
  }
  for (const char* const text : {"3", "32", "-1", "8 ", "off", "99999999999999999999"}) {
    expect::that(cluster_blocks_of(text) == -1, "not a number of blocks");
  }
}

}  // namespace

int main() {
  check_switch();
  check_vocabularies();
  check_common_vocabularies();
  check_limits();
  return expect::report("test_tuning");
}
