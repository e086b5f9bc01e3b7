// SPDX-License-Identifier: Apache-2.0
// The warp of a block that starts the copies. Part of divergence_cluster.cuh.
#pragma once

namespace opd {
namespace cuda {

// The chunks of this block's slices, row after row, each into the next slot once it is free.
template <class View>
__device__ void load_rows(const View& block) {
  constexpr int kQuad = 4;
  const ClusterArgs& args = block.args;
  const int chunk = args.plan.chunk, columns = block.columns();
  RowsOfCluster rows(args, block.lane);
  RingPosition at;
  bool first_lap = true;
  while (true) {
    const int64_t row = rows.next([](int64_t) {});
    if (row >= args.num_tokens) return;
    const float* student =
        args.student.logits + row * args.student.stride + block.first_column();
    const float* teacher =
        args.teacher.logits + row * args.teacher.stride + block.first_column();
    for (int k = 0; k < args.plan.chunks; ++k, student += chunk, teacher += chunk) {
      // the lap before has to be over
      if (!first_lap) wait(block.empty(at.slot), at.parity ^ 1);
      const int left = columns - k * chunk;
      const int count = left <= 0 ? 0 : left < chunk ? left : chunk;
      const int whole = count & ~(kQuad - 1);
      float* const to = block.chunk_at(at.slot);
      // a copy moves whole quads, and what lies behind a row is not to be read
      if (whole < count && block.lane < kQuad) {
        const int i = whole + block.lane;
        to[i] = i < count ? student[i] : kMinusInfinity;
        to[chunk + i] = i < count ? teacher[i] : kMinusInfinity;
      }
      __syncwarp();
      if (block.lane == 0) {
        const uint32_t bytes = static_cast<uint32_t>(whole) * sizeof(float);
        expect_bytes(block.full(at.slot), 2 * bytes);
        if (bytes > 0) {
          copy_bulk(to, student, bytes, block.full(at.slot));
          copy_bulk(to + chunk, teacher, bytes, block.full(at.slot));
        }
      }
      at.advance(args.plan.ring);
      if (at.slot == 0) first_lap = false;
    }
  }
}

}  // namespace cuda
}  // namespace opd
