// SPDX-License-Identifier: Apache-2.0
// The warps that hold the row. Part of divergence_cluster.cuh.
//
// In order, of row n: wait for its laws, (row sums,) terms; exponentials of as much of row n + 1 as is
// on chip; wait for the sums of row n, its gradient, which frees tiles and starts their next loads; the
// rest of the exponentials of row n + 1.
#pragma once

namespace opd {
namespace cuda {

// A warp's columns of the row that begins in some slot, for what is rare: as functions of their own, so
// that the rest keeps everything in registers.
struct Share {
  float* memory;
  int columns, tile, tiles, ring, lane;
};

// fn(address) of each of the lane's columns, the student's side.
template <class Fn>
__device__ __forceinline__ void for_columns(const Share& share, int row_slot, Fn&& fn) {
  for (int tile = 0; tile < share.tiles; ++tile) {
    int slot = row_slot + tile;
    if (slot >= share.ring) slot -= share.ring;
    const float* const values = share.memory + static_cast<int64_t>(slot) * share.tile * 2;
    for (int i = share.lane; i < share.tile && tile * share.tile + i < share.columns; i += kWarp) {
      fn(values + i);
    }
  }
}

// A lane's part of sum p^alpha q^(1 - alpha).
__device__ __noinline__ double mass_in_double(Share share, int row_slot, double alpha,
                                              const RowLaws* laws) {
  double sum = 0.0;
  for_columns(share, row_slot, [&](const float* logit) {
    const Entry<float> e = entry_of<true>(logit[0], logit[share.tile], *laws);
    const double lp = static_cast<double>(e.lp) + static_cast<double>(e.lp_low);
    const double lq = static_cast<double>(e.lq) + static_cast<double>(e.lq_low);
    sum += e.absent() ? 0.0 : ::exp(alpha * lp + (1.0 - alpha) * lq);
  });
  return sum;
}

template <class F, bool kStatistics>
class Sweeper {
 public:
  __device__ Sweeper(const BlockView<F, kStatistics>& block, const F& functor)
      : block_(block),
        args_(block.args),
        base_(functor),
        lane_(block.lane),
        tiles_(block.args.plan.tiles),
        ring_(block.args.plan.ring),
        tile_(block.args.plan.tile),
        load_rows_(block.args, block.lane) {
    const int64_t slice = args_.plan.slice * cluster_rank();
    const int64_t end = slice + args_.plan.slice < args_.vocab_size ? slice + args_.plan.slice
                                                                   : args_.vocab_size;
    first_column_ = slice + static_cast<int64_t>(block.warp) * tiles_ * tile_;
    const int64_t columns = end - first_column_;
    const int most = tiles_ * tile_;
    columns_ = columns <= 0 ? 0 : columns < most ? static_cast<int>(columns) : most;
    tiles_memory_ = reinterpret_cast<float*>(block.shared) +
                    static_cast<int64_t>(block.warp) * ring_ * tile_ * 2;
    barriers_ = block.tile_barriers() + block.warp * ring_;
  }

  __device__ void run() {
    load_row_ = load_rows_.next([](int64_t) {});
    for (int slot = 0; slot < ring_; ++slot) load_next(slot);
    RowsOfCluster rows(args_, lane_);
    const auto zero = [&](int64_t skipped) { zero_row(skipped); };
    int64_t row = rows.next(zero);
    if (row >= args_.num_tokens) return;
    const int early = ring_ - tiles_ < tiles_ ? ring_ - tiles_ : tiles_;
    int row_slot = 0;  // of the first tile of the row
    RingPosition at;   // of the next tile whose logits come
    uint32_t parity = 0;
    begin_lse(row);
    int next_slot = at.slot;
    add_lse(&at, 0, tiles_);
    send_lse();
    while (true) {
      wait(block_.published(kLseExchange), parity);
      const RowLaws laws = *block_.laws();
      if constexpr (F::kRowSums > 0) {
        send_row_sums(row_slot, laws);
        const F functor = *block_.functor();
        if constexpr (F::kHasTextbook) {
          functor.barely_overlaps() ? send_terms<true>(row_slot, laws, functor)
                                    : send_terms<false>(row_slot, laws, functor);
        } else {
          send_terms<false>(row_slot, laws, functor);
        }
      } else {
        send_terms<false>(row_slot, laws, base_);
      }
      const int64_t next = rows.next(zero);
      const bool is_last = next >= args_.num_tokens;
      if (!is_last) {
        next_slot = at.slot;
        if (early > 0) {
          begin_lse(next);
          add_lse(&at, 0, early);
        }
        if (early == tiles_) send_lse();
      }
      wait(block_.published(kTermExchange), parity);
      write_gradient(row, row_slot);
      if (is_last) return;
      if (early < tiles_) {
        if (early == 0) begin_lse(next);
        add_lse(&at, early, tiles_);
        send_lse();
      }
      row = next, row_slot = next_slot, parity ^= 1;
    }
  }

 private:
  static constexpr int kQuad = 4;  // columns that a lane takes at once

  __device__ float* tile_at(int slot) const {
    return tiles_memory_ + static_cast<int64_t>(slot) * tile_ * 2;
  }
  __device__ Share share() const { return {tiles_memory_, columns_, tile_, tiles_, ring_, lane_}; }
  __device__ int columns_of(int tile) const {
    const int rest = columns_ - tile * tile_;
    return rest <= 0 ? 0 : rest < tile_ ? rest : tile_;
  }

  // fn(student quad, teacher quad, first column) of each quad of tile number `tile`, in `slot`.
  template <int kUnroll, class Fn>
  __device__ __forceinline__ void for_quads(int slot, int tile, Fn&& fn) const {
    const int quads = (columns_of(tile) + kQuad - 1) / kQuad;
    float4* student = reinterpret_cast<float4*>(tile_at(slot)) + lane_;
    float4* teacher = reinterpret_cast<float4*>(tile_at(slot) + tile_) + lane_;
#pragma unroll kUnroll
    for (int i = lane_; i < quads; i += kWarp, student += kWarp, teacher += kWarp) {
      fn(*student, *teacher, i * kQuad);
    }
  }
  template <class Fn>
  __device__ __forceinline__ void for_tiles(int slot, Fn&& fn) const {
#pragma unroll 1
    for (int tile = 0; tile < tiles_; ++tile) {
      fn(slot, tile);
      if (++slot == ring_) slot = 0;
    }
  }

  // -- loads ---------------------------------------------------------------------------------------

  // The next tile of the rows to come into a slot that is free.
  __device__ __forceinline__ void load_next(int slot) {
    if (load_row_ >= args_.num_tokens) return;
    if (lane_ == 0) load(slot);
    if (++load_tile_ == tiles_) {
      load_tile_ = 0;
      load_row_ = load_rows_.next([](int64_t) {});
    }
  }

  __device__ __forceinline__ void load(int slot) {
    const int count = columns_of(load_tile_), whole = count & ~(kQuad - 1);
    const int64_t column = first_column_ + load_tile_ * tile_;
    const float* const student = args_.student.logits + load_row_ * args_.student.stride + column;
    const float* const teacher = args_.teacher.logits + load_row_ * args_.teacher.stride + column;
    float* const to = tile_at(slot);
    if (whole < count) {
      // a copy moves whole quads, and what lies behind a row is not to be read
      for (int i = whole; i < whole + kQuad; ++i) {
        constexpr float lowest = -std::numeric_limits<float>::infinity();
        to[i] = i < count ? student[i] : lowest;
        to[tile_ + i] = i < count ? teacher[i] : lowest;
      }
    }
    const uint32_t bytes = static_cast<uint32_t>(whole) * sizeof(float);
    expect_bytes(barriers_ + slot, 2 * bytes);
    if (bytes == 0) return;
    copy_bulk(to, student, bytes, barriers_ + slot);
    copy_bulk(to + tile_, teacher, bytes, barriers_ + slot);
  }

  // -- exponentials --------------------------------------------------------------------------------

  __device__ __forceinline__ void begin_lse(int64_t row) {
    student_lse_.begin(block_.factor(args_.student, row).exponents);
    teacher_lse_.begin(block_.factor(args_.teacher, row).exponents);
  }

  // Tiles begin .. end of the row that `at` is in, as they arrive.
  __device__ __forceinline__ void add_lse(RingPosition* at, int begin, int end) {
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      wait(barriers_ + at->slot, at->parity);
      float student_largest = kLowest, teacher_largest = kLowest;
      for_quads<2>(at->slot, tile, [&](const float4& s, const float4& t, int) {
        student_largest = detail::max_device(student_largest, largest_of(s));
        teacher_largest = detail::max_device(teacher_largest, largest_of(t));
      });
      student_lse_.raise(warp_largest(student_largest));
      teacher_lse_.raise(warp_largest(teacher_largest));
      for_quads<2>(at->slot, tile, [&](const float4& s, const float4& t, int column) {
        const int at_column = tile * tile_ + column;
        student_lse_.add(s, at_column);
        teacher_lse_.add(t, at_column);
      });
      at->advance(ring_);
    }
  }

  __device__ __forceinline__ void send_lse() {
    double* const out = block_.partials(block_.warp) + View::first_of(kLseExchange);
    const double student = student_lse_.warp_sum(), teacher = teacher_lse_.warp_sum();
    int student_column = 0, teacher_column = 0;
    if constexpr (kStatistics) {
      student_column = __reduce_min_sync(kAllLanes, student_lse_.column);
      teacher_column = __reduce_min_sync(kAllLanes, teacher_lse_.column);
    }
    if (lane_ == 0) {
      out[0] = student_lse_.largest, out[1] = student;
      out[2] = teacher_lse_.largest, out[3] = teacher;
      if constexpr (kStatistics) {
        const double first = static_cast<double>(first_column_);
        out[4] = student_column == kNoColumn ? kNoColumn : first + student_column;
        out[5] = teacher_column == kNoColumn ? kNoColumn : first + teacher_column;
      }
      arrive(block_.gathered(kLseExchange));
    }
  }

  // -- sums and terms ------------------------------------------------------------------------------

  // Sums of the lanes' values, to this warp's place.
  template <Exchange kKind, int kCount>
  __device__ __forceinline__ void send(const double* lane_sums) {
    double* const out = block_.partials(block_.warp) + View::first_of(kKind);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const double sum = reduce_warp(lane_sums[k], Sum());
      if (lane_ == 0) out[k] = sum;
    }
    if (lane_ == 0) arrive(block_.gathered(kKind));
  }

  __device__ __forceinline__ void send_row_sums(int row_slot, const RowLaws& laws) {
    float sums[3] = {};
    for_tiles(row_slot, [&](int slot, int tile) {
      for_quads<1>(slot, tile, [&](const float4& s, const float4& t, int) {
        const float student[kQuad] = {s.x, s.y, s.z, s.w}, teacher[kQuad] = {t.x, t.y, t.z, t.w};
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          float parts[3] = {};
          base_.row_sums(entry_of<kReadsLowParts<F>>(student[j], teacher[j], laws), parts);
#pragma unroll
          for (int k = 0; k < F::kRowSums; ++k) sums[k] += parts[k];
        }
      });
    });
    const double wide[3] = {sums[0], sums[1], sums[2]};
    send<kRowSumExchange, F::kRowSums>(wide);
    wait(block_.published(kRowSumExchange), row_sum_parity_);
    row_sum_parity_ ^= 1;
    if constexpr (std::is_same_v<F, Renyi>) {
      if (*block_.again() == 0) return;
      const double mass[2] = {0.0, mass_in_double(share(), row_slot, base_.alpha, block_.laws())};
      send<kRowSumExchange, F::kRowSums>(mass);
      wait(block_.published(kRowSumExchange), row_sum_parity_);
      row_sum_parity_ ^= 1;
    }
  }

  // Leaves dterm and q where the logits were.
  template <bool kTextbook>
  __device__ __forceinline__ void send_terms(int row_slot, const RowLaws& laws, const F& functor) {
    float sums[View::kTermValues] = {};
    for_tiles(row_slot, [&](int slot, int tile) {
      for_quads<1>(slot, tile, [&](float4& s, float4& t, int) {
        const float student[kQuad] = {s.x, s.y, s.z, s.w}, teacher[kQuad] = {t.x, t.y, t.z, t.w};
        float dterm[kQuad], q[kQuad];
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          const Entry<float> e = entry_of<kReadsLowParts<F>>(student[j], teacher[j], laws);
          sums[0] += functor.term(e);
          if constexpr (kTextbook) {
            dterm[j] = functor.dterm_textbook(e);
          } else {
            dterm[j] = functor.dterm(e);
          }
          sums[1] += dterm[j];
          q[j] = e.q;
          if constexpr (kStatistics) {
            sums[2] += select(e.q == 0.0f, 0.0f, -e.q * e.lq);
            sums[3] += select(e.p == 0.0f, 0.0f, -e.p * e.lp);
            sums[4] += ForwardKl{}.term(e);
            sums[5] += ReverseKl{}.term(e);
          }
        }
        s = {dterm[0], dterm[1], dterm[2], dterm[3]};
        t = {q[0], q[1], q[2], q[3]};
      });
    });
    double wide[View::kTermValues];
#pragma unroll
    for (int k = 0; k < View::kTermValues; ++k) wide[k] = sums[k];
    send<kTermExchange, View::kTermValues>(wide);
  }

  // -- gradient ------------------------------------------------------------------------------------

  // fn(pointer to this warp's first element of a row of the gradient), in the type that it has.
  template <class Fn>
  __device__ __forceinline__ void with_gradient_row(int64_t row, Fn&& fn) const {
    const int64_t at = row * args_.grad.row_stride + first_column_;
    if (args_.grad.dtype == OPD_FLOAT32) {
      fn(static_cast<float*>(args_.grad.data) + at);
    } else if (args_.grad.dtype == OPD_BFLOAT16) {
      fn(static_cast<BFloat16*>(args_.grad.data) + at);
    } else {
      fn(static_cast<Float16*>(args_.grad.data) + at);
    }
  }

  // Each tile is free once its gradient is out, and takes what comes next.
  __device__ __forceinline__ void write_gradient(int64_t row, int row_slot) {
    const GradScalars scalars = *block_.grad_scalars();
    if (scalars.zero) zero_row(row);
    for_tiles(row_slot, [&](int slot, int tile) {
      if (!scalars.zero) {
        with_gradient_row(row, [&](auto* out) {
          write_tile(slot, tile, scalars, out + tile * tile_);
        });
      }
      fence_reads_before_copy();
      __syncwarp();
      load_next(slot);
    });
  }

  template <class Storage>
  __device__ __forceinline__ void write_tile(int slot, int tile, const GradScalars& scalars,
                                             Storage* out) const {
    const int count = columns_of(tile), quads = count / kQuad;
    const float* const dterm = tile_at(slot);
    const float* const law = dterm + tile_;
    const auto gradient = [&](float d, float q) {
      return scalars.scale * detail::fma_device(-q, scalars.grad_sum, d);
    };
    const float4* dterms = reinterpret_cast<const float4*>(dterm) + lane_;
    const float4* laws = reinterpret_cast<const float4*>(law) + lane_;
    Storage* to = out + lane_ * kQuad;
#pragma unroll 2
    for (int i = lane_; i < quads; i += kWarp) {
      const float4 d = *dterms, q = *laws;
      const float values[kQuad] = {gradient(d.x, q.x), gradient(d.y, q.y), gradient(d.z, q.z),
                                   gradient(d.w, q.w)};
      store_quad(values, to);
      dterms += kWarp, laws += kWarp, to += kWarp * kQuad;
    }
    const int i = quads * kQuad + lane_;
    if (i < count) from_real(gradient(dterm[i], law[i]), out + i);
  }

  __device__ void zero_row(int64_t row) const {
    with_gradient_row(row, [&](auto* out) {
      const float zeros[kQuad] = {};
      const int quads = columns_ / kQuad;
      for (int i = lane_; i < quads; i += kWarp) store_quad(zeros, out + i * kQuad);
      const int i = quads * kQuad + lane_;
      if (i < columns_) from_real(0.0f, out + i);
    });
  }

  using View = BlockView<F, kStatistics>;
  const View& block_;
  const ClusterArgs& args_;
  const F& base_;
  const int lane_, tiles_, ring_, tile_;
  int64_t first_column_;
  int columns_;  // of this warp, per row
  float* tiles_memory_;
  MemoryBarrier* barriers_;
  RowsOfCluster load_rows_;
  int64_t load_row_ = 0;
  int load_tile_ = 0;
  LaneLse<kStatistics> student_lse_, teacher_lse_;
  uint32_t row_sum_parity_ = 0;
};

}  // namespace cuda
}  // namespace opd
