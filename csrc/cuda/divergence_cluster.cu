// SPDX-License-Identifier: Apache-2.0
#include "divergence_cluster.h"

#include "divergence_cluster.cuh"
#include "vectorized.cuh"

namespace opd {
namespace cuda {
namespace {

constexpr int kFloatsPer16Bytes = 4;

// Calls fn with the functor of the divergence; false if it is not one that this kernel has.
template <class Fn>
bool visit_cluster_divergence(const opd_divergence_component_t& component, Fn&& fn) {
  bool taken = false;
  visit_divergence(component.divergence, component.param0, component.param1, [&](auto functor) {
    if constexpr (!decltype(functor)::kNeedsThreshold) {
      fn(functor);
      taken = true;
    }
  });
  return taken;
}

template <class F>
RowNeeds needs_of(bool with_statistics) {
  RowNeeds needs;
  needs.lse_values = with_statistics ? 6 : 4;
  needs.term_values = with_statistics ? 6 : 2;
  needs.row_sum_values = F::kRowSums;
  needs.again_values = kAgainValues<F>;
  needs.functor_bytes = F::kRowSums > 0 ? static_cast<int>(sizeof(F)) : 0;
  return needs;
}

bool is_plain(const opd_logits_t& side) {
  return side.matrix.dtype == OPD_FLOAT32 && side.bias == nullptr && side.softcap == 0.0 &&
         side.scale > 0.0 &&
         is_aligned_16(side.matrix.data) && side.matrix.row_stride % kFloatsPer16Bytes == 0;
}

bool takes_gradient(const opd_divergence_args_t& args) {
  const bool is_float = args.grad.dtype == OPD_FLOAT32;
  if (!is_float && args.grad.dtype != OPD_BFLOAT16 && args.grad.dtype != OPD_FLOAT16) return false;
  if (!is_aligned_16(args.grad.data) || args.grad.row_stride % kFloatsPer16Bytes != 0) return false;
  if (args.grad.data == args.teacher.matrix.data) return false;
  const int64_t in_place = args.student.matrix.row_stride * (is_float ? 1 : 2);
  return args.grad.data != args.student.matrix.data || args.num_tokens <= 1 ||
         args.grad.row_stride == in_place;
}

SideArgs side_args(const opd_logits_t& side) {
  return {static_cast<const float*>(side.matrix.data), side.matrix.row_stride, side.scale,
          static_cast<const float*>(side.temperatures), factor_of(side.scale, side.temperature)};
}

ClusterArgs cluster_args(const opd_divergence_args_t& args) {
  ClusterArgs out{};
  out.student = side_args(args.student), out.teacher = side_args(args.teacher);
  out.num_tokens = args.num_tokens, out.vocab_size = args.vocab_size;
  out.grad_width = args.grad_width;
  out.token_weights = static_cast<const float*>(args.token_weights);
  out.coefficients = static_cast<const float*>(args.components[0].coefficients);
  out.loss = static_cast<float*>(args.loss);
  out.statistics = static_cast<float*>(args.statistics);
  out.token_ids = args.token_ids;
  out.topk_ids = args.topk_ids, out.num_topk = args.num_topk;
  out.grad = args.grad;
  const opd_divergence_component_t& component = args.components[0];
  out.centred = component.divergence == OPD_CONCRETE_SCORE && component.param0 != 0 &&
                component.param1 != 0;
  return out;
}

template <class Kernel>
int active_clusters(Kernel kernel, const RowPlan& plan, void* stream) {
  const Shape shape{plan.cluster, plan.threads(), plan.shared_bytes(), plan.cluster};
  allow(kernel, shape);
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = config_of(shape, stream, &attribute);
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    // a part of a GPU may have no room for a cluster of this size
    cudaGetLastError();
    return 0;
  }
  return count;
}

template <class F, bool kStatistics>
void launch_rows(ClusterArgs args, const F& functor, const Device& device, void* stream) {
  const auto kernel = &forward_grad_cluster_kernel<F, kStatistics>;
  const RowNeeds needs = needs_of<F>(kStatistics);
  RowPlan plan;
  choose_rows(args.vocab_size, device.shared_bytes_per_block, kMaxClusterBlocks, needs, &plan);
  int64_t clusters = device.multiprocessors * plan.resident;
  if (plan.cluster > 1) {
    clusters = active_clusters(kernel, plan, stream);
    // a part whose groups of multiprocessors are cut small holds few large clusters
    constexpr int kPortable = 8;
    RowPlan smaller;
    if (plan.cluster > kPortable &&
        plan_rows(args.vocab_size, device.shared_bytes_per_block, kPortable, needs, &smaller)) {
      const int64_t count = active_clusters(kernel, smaller, stream);
      if (4 * clusters * plan.cluster < 3 * count * kPortable) plan = smaller, clusters = count;
    }
    OPD_CHECK(clusters > 0, "divergence: this device holds no cluster of ", plan.cluster,
              " blocks; use logits that are not aligned to 16 bytes, or another backend");
  }
  if (clusters > args.num_tokens) clusters = args.num_tokens;
  args.plan = plan;
  launch({clusters * plan.cluster, plan.threads(), plan.shared_bytes(), plan.cluster}, stream,
         kernel, args, functor);
}

}  // namespace

bool cluster_takes(const opd_divergence_args_t& args, const Device& device) {
  // the architectures with clusters that this library is built for
  if (device.capability != 90 && device.capability != 100) return false;
  if (args.num_components != 1 || args.target != OPD_TARGET_TEACHER) return false;
  if (!is_plain(args.student) || !is_plain(args.teacher) || !takes_gradient(args)) return false;
  if ((args.statistics != nullptr) != (args.with_statistics != 0)) return false;
  bool fits = false;
  visit_cluster_divergence(args.components[0], [&](auto functor) {
    RowPlan plan;
    fits = choose_rows(args.vocab_size, device.shared_bytes_per_block, kMaxClusterBlocks,
                       needs_of<decltype(functor)>(args.statistics != nullptr), &plan);
  });
  return fits;
}

void forward_grad_cluster(const opd_divergence_args_t& args, const Device& device, void* stream) {
  if (args.num_tokens == 0) return;
  const ClusterArgs out = cluster_args(args);
  visit_cluster_divergence(args.components[0], [&](auto functor) {
    if (out.statistics) {
      launch_rows<decltype(functor), true>(out, functor, device, stream);
    } else {
      launch_rows<decltype(functor), false>(out, functor, device, stream);
    }
  });
}

}  // namespace cuda
}  // namespace opd
