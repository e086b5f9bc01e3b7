// SPDX-License-Identifier: Apache-2.0
// The warps that hold the row. Part of divergence_cluster.cuh.
//
// In order, of row n: wait for its laws, (head, row sums,) terms; exponentials of as much of row
// n + 1 as is on chip; wait for the sums of row n, its gradient, which frees its chunks; the
// rest of the exponentials of row n + 1.
#pragma once

namespace opd {
namespace cuda {

// p^alpha q^(1 - alpha); a function of its own, so that what is rare takes no registers.
__device__ __noinline__ double mass_in_double(double alpha, float student, float teacher,
                                              const RowLaws* laws) {
  const Entry<float> e = entry_of<true>(student, teacher, *laws);
  const double lp = static_cast<double>(e.lp) + static_cast<double>(e.lp_low);
  const double lq = static_cast<double>(e.lq) + static_cast<double>(e.lq_low);
  return e.absent() ? 0.0 : ::exp(alpha * lp + (1.0 - alpha) * lq);
}

template <class F, bool kStatistics>
class Sweeper {
 public:
  __device__ Sweeper(const BlockView<F, kStatistics>& block, const F& functor)
      : block_(block),
        args_(block.args),
        base_(functor),
        lane_(block.lane),
        chunks_(block.args.plan.chunks),
        ring_(block.args.plan.ring),
        tile_(block.args.plan.tile),
        chunk_(block.args.plan.chunk),
        columns_(block.columns() - block.warp * block.args.plan.tile) {
    const int left = chunk_ - block.warp * tile_;
    most_ = left < tile_ ? left : tile_;
  }

  __device__ void run() {
    RowsOfCluster rows(args_, lane_);
    const auto zero = [&](int64_t skipped) { zero_row(skipped); };
    int64_t row = rows.next(zero);
    if (row >= args_.num_tokens) return;
    const int early = ring_ - chunks_ < chunks_ ? ring_ - chunks_ : chunks_;
    int row_slot = 0;  // of the first chunk of the row
    RingPosition at;   // of the next chunk whose logits come
    uint32_t parity = 0;
    begin_lse(row);
    int next_slot = at.slot;
    add_lse(&at, 0, chunks_);
    send_lse();
    while (true) {
      wait(block_.published(kLseExchange), parity);
      const RowLaws laws = *block_.laws();
      if constexpr (F::kRowSums > 0) {
        if constexpr (F::kNeedsThreshold) {
          const F with_head = base_.with_threshold(find_head(row_slot, laws.teacher));
          send_row_sums(row_slot, laws, with_head, parity);
        } else {
          send_row_sums(row_slot, laws, base_, parity);
        }
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
        if (early == chunks_) send_lse();
      }
      wait(block_.published(kTermExchange), parity);
      write_gradient(row, row_slot);
      if (is_last) return;
      if (early < chunks_) {
        if (early == 0) begin_lse(next);
        add_lse(&at, early, chunks_);
        send_lse();
      }
      row = next, row_slot = next_slot, parity ^= 1;
    }
  }

 private:
  static constexpr int kQuad = 4;  // columns that a lane takes at once
  // of the sweep over terms; two of the short ones hide each other's latencies
  static constexpr int kTermsAtOnce = kStatistics || kReadsLowParts<F> ? 1 : 2;

  // This warp's columns of chunk number `chunk`: where they begin in the block's slice, how many.
  __device__ int first_of(int chunk) const { return chunk * chunk_ + block_.warp * tile_; }
  __device__ int columns_of(int chunk) const {
    const int left = columns_ - chunk * chunk_;
    const int most = left < most_ ? left : most_;
    return most > 0 ? most : 0;
  }
  // The student's side of them; the teacher's is chunk_ further.
  __device__ float* tile_at(int slot) const {
    return block_.chunk_at(slot) + block_.warp * tile_;
  }

  // fn(student quad, teacher quad, first column) of each quad of chunk number `chunk`, in `slot`;
  // kAtOnce of them are read before the first is worked on. kWrites: fn changes them.
  template <int kAtOnce, bool kWrites, class Fn>
  __device__ __forceinline__ void for_quads(int slot, int chunk, Fn&& fn) const {
    const int quads = (columns_of(chunk) + kQuad - 1) / kQuad;
    float4* student = reinterpret_cast<float4*>(tile_at(slot)) + lane_;
    float4* teacher = reinterpret_cast<float4*>(tile_at(slot) + chunk_) + lane_;
    const auto take = [&](auto count, int i) {
      constexpr int kCount = decltype(count)::value;
      float4 s[kCount], t[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) s[k] = student[k * kWarp], t[k] = teacher[k * kWarp];
#pragma unroll
      for (int k = 0; k < kCount; ++k) fn(s[k], t[k], (i + k * kWarp) * kQuad);
      if constexpr (kWrites) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) student[k * kWarp] = s[k], teacher[k * kWarp] = t[k];
      }
      student += kCount * kWarp, teacher += kCount * kWarp;
    };
    int i = lane_;
    if constexpr (kAtOnce > 1) {
#pragma unroll 1
      for (; i + (kAtOnce - 1) * kWarp < quads; i += kAtOnce * kWarp) {
        take(std::integral_constant<int, kAtOnce>(), i);
      }
    }
#pragma unroll 1
    for (; i < quads; i += kWarp) take(std::integral_constant<int, 1>(), i);
  }
  template <class Fn>
  __device__ __forceinline__ void for_chunks(int slot, Fn&& fn) const {
#pragma unroll 1
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      fn(slot, chunk);
      if (++slot == ring_) slot = 0;
    }
  }

  // -- exponentials ------------------------------------------------------------------------------

  __device__ __forceinline__ void begin_lse(int64_t row) {
    student_lse_.begin(block_.factor(args_.student, row).exponents);
    teacher_lse_.begin(block_.factor(args_.teacher, row).exponents);
  }

  // Chunks begin .. end of the row that `at` is in, as they arrive.
  __device__ __forceinline__ void add_lse(RingPosition* at, int begin, int end) {
#pragma unroll 1
    for (int chunk = begin; chunk < end; ++chunk) {
      wait(block_.full(at->slot), at->parity);
      float student_largest = kMinusInfinity, teacher_largest = kMinusInfinity;
      for_quads<2, false>(at->slot, chunk, [&](const float4& s, const float4& t, int) {
        student_largest = detail::max_device(student_largest, largest_of(s));
        teacher_largest = detail::max_device(teacher_largest, largest_of(t));
      });
      student_lse_.raise(warp_largest(student_largest));
      teacher_lse_.raise(warp_largest(teacher_largest));
      for_quads<2, false>(at->slot, chunk, [&](const float4& s, const float4& t, int column) {
        const int at_column = first_of(chunk) + column;
        student_lse_.add(s, at_column);
        teacher_lse_.add(t, at_column);
      });
      at->advance(ring_);
    }
  }

  __device__ __forceinline__ void send_lse() {
    double* const out = block_.partials(block_.warp) + View::first_of(kLseExchange);
    const double sum = reduce_pair(student_lse_.sum(), teacher_lse_.sum(), lane_);
    int student_column = 0, teacher_column = 0;
    if constexpr (kStatistics) {
      student_column = __reduce_min_sync(kAllLanes, student_lse_.column);
      teacher_column = __reduce_min_sync(kAllLanes, teacher_lse_.column);
    }
    if (lane_ % (kWarp / 2) == 0) out[lane_ == 0 ? 1 : 3] = sum;
    __syncwarp();
    if (lane_ == 0) {
      out[0] = student_lse_.largest, out[2] = teacher_lse_.largest;
      if constexpr (kStatistics) {
        const double first = static_cast<double>(block_.first_column());
        out[4] = student_column == kNoColumn ? kNoColumn : first + student_column;
        out[5] = teacher_column == kNoColumn ? kNoColumn : first + teacher_column;
      }
      arrive(block_.gathered(kLseExchange));
    }
  }

  // -- sums and terms ----------------------------------------------------------------------------

  // Sums of the lanes' values, to this warp's place.
  template <Exchange kKind, int kCount>
  __device__ __forceinline__ void send(const double* lane_sums) {
    double* const out = block_.partials(block_.warp) + View::first_of(kKind);
    if constexpr (kCount % 2 == 0) {
#pragma unroll
      for (int k = 0; k < kCount; k += 2) {
        const double sum = reduce_pair(lane_sums[k], lane_sums[k + 1], lane_);
        if (lane_ % (kWarp / 2) == 0) out[k + lane_ / (kWarp / 2)] = sum;
      }
      __syncwarp();
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const double sum = reduce_warp(lane_sums[k], Sum());
        if (lane_ == 0) out[k] = sum;
      }
    }
    if (lane_ == 0) arrive(block_.gathered(kKind));
  }

  // The least log p of the head.
  __device__ __forceinline__ float find_head(int row_slot, const RowLaws::Side& teacher) {
    while (true) {
      wait(block_.published(kHeadExchange), head_parity_);
      head_parity_ ^= 1;
      const HeadRange range = *block_.head();
      if (range.shift < 0) return range.threshold;
      const float least = least_logit(range, teacher.factor, teacher.lse);
      LaneMasses masses(block_.head_bins(head_turn_)->masses(), range);
      for_chunks(row_slot, [&](int slot, int chunk) {
        for_quads<2, false>(slot, chunk, [&](const float4&, const float4& t, int) {
          if (!(largest_of(t) >= least)) return;
          const float logits[kQuad] = {t.x, t.y, t.z, t.w};
#pragma unroll
          for (int j = 0; j < kQuad; ++j) {
            masses.add(log_probability(logits[j], teacher),
                       [&] { return probability(logits[j], teacher); });
          }
        });
      });
      masses.flush();
      __syncwarp();
      if (lane_ == 0) arrive(block_.gathered(kHeadExchange));
      head_turn_ ^= 1;
    }
  }

  __device__ __forceinline__ void send_row_sums(int row_slot, const RowLaws& laws, const F& base,
                                                uint32_t parity) {
    float sums[3] = {};
    for_chunks(row_slot, [&](int slot, int chunk) {
      for_quads<1, false>(slot, chunk, [&](const float4& s, const float4& t, int) {
        const float student[kQuad] = {s.x, s.y, s.z, s.w}, teacher[kQuad] = {t.x, t.y, t.z, t.w};
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          float parts[3] = {};
          base.row_sums(entry_of<kReadsLowParts<F>>(student[j], teacher[j], laws), parts);
#pragma unroll
          for (int k = 0; k < F::kRowSums; ++k) sums[k] += parts[k];
        }
      });
    });
    const double wide[3] = {sums[0], sums[1], sums[2]};
    send<kRowSumExchange, F::kRowSums>(wide);
    wait(block_.published(kRowSumExchange), parity);
    if constexpr (std::is_same_v<F, Renyi>) {
      if (*block_.again() == 0) return;
      double mass = 0;
      for_chunks(row_slot, [&](int slot, int chunk) {
        for_quads<1, false>(slot, chunk, [&](const float4& s, const float4& t, int) {
          const float student[kQuad] = {s.x, s.y, s.z, s.w}, teacher[kQuad] = {t.x, t.y, t.z, t.w};
#pragma unroll 1
          for (int j = 0; j < kQuad; ++j) {
            mass += mass_in_double(base_.alpha, student[j], teacher[j], block_.laws());
          }
        });
      });
      send<kAgainExchange, 1>(&mass);
      wait(block_.published(kAgainExchange), again_parity_);
      again_parity_ ^= 1;
    }
  }

  // Leaves dterm and q where the logits were.
  template <bool kTextbook>
  __device__ __forceinline__ void send_terms(int row_slot, const RowLaws& laws, const F& functor) {
    float sums[View::kTermValues] = {};
    for_chunks(row_slot, [&](int slot, int chunk) {
      for_quads<kTermsAtOnce, true>(slot, chunk, [&](float4& s, float4& t, int) {
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

  // -- gradient ----------------------------------------------------------------------------------

  // fn(pointer to this block's first element of a row of the gradient), in the type that it has.
  template <class Fn>
  __device__ __forceinline__ void with_gradient_row(int64_t row, Fn&& fn) const {
    const int64_t at = row * args_.grad.row_stride + block_.first_column();
    if (args_.grad.dtype == OPD_FLOAT32) {
      fn(static_cast<float*>(args_.grad.data) + at);
    } else if (args_.grad.dtype == OPD_BFLOAT16) {
      fn(static_cast<BFloat16*>(args_.grad.data) + at);
    } else {
      fn(static_cast<Float16*>(args_.grad.data) + at);
    }
  }

  // A chunk is free once its gradient is out.
  __device__ __forceinline__ void write_gradient(int64_t row, int row_slot) {
    const GradScalars scalars = *block_.grad_scalars();
    if (scalars.zero) zero_row(row);
    for_chunks(row_slot, [&](int slot, int chunk) {
      if (!scalars.zero) {
        with_gradient_row(row, [&](auto* out) {
          write_tile(slot, chunk, scalars, out + first_of(chunk));
        });
      }
      fence_reads_before_copy();
      __syncwarp();
      if (lane_ == 0) arrive(block_.empty(slot));
    });
  }

  template <class Storage>
  __device__ __forceinline__ void write_tile(int slot, int chunk, const GradScalars& scalars,
                                             Storage* out) const {
    const int count = columns_of(chunk), quads = count / kQuad;
    const float* const dterm = tile_at(slot);
    const float* const law = dterm + chunk_;
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
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        const int count = columns_of(chunk), quads = count / kQuad;
        auto* const to = out + first_of(chunk);
        for (int i = lane_; i < quads; i += kWarp) store_quad(zeros, to + i * kQuad);
        const int i = quads * kQuad + lane_;
        if (i < count) from_real(0.0f, to + i);
      }
    });
  }

  using View = BlockView<F, kStatistics>;
  const View& block_;
  const ClusterArgs& args_;
  const F& base_;
  const int lane_, chunks_, ring_, tile_, chunk_;
  const int columns_;  // of the block's slice, from this warp's first on
  int most_;           // of a chunk
  LaneLse<kStatistics> student_lse_, teacher_lse_;
  uint32_t again_parity_ = 0, head_parity_ = 0, head_turn_ = 0;
};

}  // namespace cuda
}  // namespace opd
