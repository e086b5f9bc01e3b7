// SPDX-License-Identifier: Apache-2.0
// The CUDA entry points of a divergence: what is refused, and which kernel takes a call.
#include <algorithm>

#include "divergence_call.h"
#include "divergence_check.h"
#include "divergence_cluster.h"
#include "divergence_state.h"

namespace opd {
namespace cuda {
namespace {

constexpr int64_t kMaxVocab = int64_t{1} << 30;  // columns are counted in 32 bits

void check_values_of(const char* name, const opd_const_matrix_t& matrix) {
  OPD_CHECK(matrix.dtype != OPD_FLOAT64, kOp, ": on CUDA ", name,
            " must be float32, bfloat16 or float16, got float64; run it on the CPU");
}

void check_call(const opd_divergence_args_t* args) {
  check_pointer(kOp, "args", args);
  check_args(*args);
  check_values_of("student_logits", args->student.matrix);
  check_values_of("teacher_logits", args->teacher.matrix);
  OPD_CHECK(args->vocab_size <= kMaxVocab, kOp, ": on CUDA vocab_size must be at most ", kMaxVocab,
            ", got ", args->vocab_size);
}

void check_grad(const opd_divergence_args_t& args) {
  const opd_matrix_t& grad = args.grad;
  const opd_const_matrix_t& student = args.student.matrix;
  check_dtype(kOp, "grad", grad.dtype);
  OPD_CHECK(grad.dtype != OPD_FLOAT64, kOp,
            ": on CUDA grad must be float32, bfloat16 or float16, got float64");
  check_gradient(kOp, grad, args.num_tokens, args.grad_width, args.vocab_size);
  OPD_CHECK(args.grad_width <= kMaxVocab, kOp, ": on CUDA grad_width must be at most ", kMaxVocab,
            ", got ", args.grad_width);
  OPD_CHECK(grad.data != args.teacher.matrix.data || grad.dtype == args.teacher.matrix.dtype, kOp,
            ": grad must not lie in the teacher's logits in another dtype");
  const bool narrower = student.dtype == OPD_FLOAT32 && grad.dtype != OPD_FLOAT32;
  if (grad.data != student.data) return;
  OPD_CHECK(narrower || (student.dtype == OPD_FLOAT32) == (grad.dtype == OPD_FLOAT32), kOp,
            ": a float32 grad does not fit into the memory of 16-bit logits");
  const int64_t expected = narrower ? 2 * student.row_stride : student.row_stride;
  OPD_CHECK(args.num_tokens == 1 || grad.row_stride == expected, kOp,
            ": a grad in the logits' memory must have their rows: row_stride must be ", expected,
            ", got ", grad.row_stride);
}

Call call_of(const opd_divergence_args_t& args, unsigned steps) {
  Call call{};
  call.steps = steps;
  call.vocab_size = static_cast<int32_t>(args.vocab_size);
  call.num_components = args.num_components;
  call.num_tokens = args.num_tokens;
  call.first_column = args.first_column;
  call.student = side_of(args.student);
  call.teacher = side_of(args.teacher);
  call.target = args.target;
  call.target_student = static_cast<float>(args.target_student);
  call.target_teacher = static_cast<float>(args.target_teacher);
  if (args.target == OPD_TARGET_GEOMETRIC && args.target_reference != 0.0) {
    check_values_of("reference_logits", args.reference.matrix);
    call.reference = side_of(args.reference);
    call.target_reference = static_cast<float>(args.target_reference);
  }
  // a target without a student in it has no gradient of its own
  call.live_target = args.live_target != 0 && args.target != OPD_TARGET_TEACHER &&
                     (args.target == OPD_TARGET_MIXTURE || args.target_student != 0.0);
  call.mixture_weights = static_cast<const float*>(args.mixture_weights);
  call.token_weights = static_cast<const float*>(args.token_weights);
  call.labels = args.num_labels > 0 ? args.labels : nullptr;
  call.label_weights = static_cast<const float*>(args.label_weights);
  call.token_ids = args.token_ids;
  call.topk_ids = args.num_topk > 0 ? args.topk_ids : nullptr;
  call.num_labels = call.labels ? args.num_labels : 0;
  call.num_topk = args.num_topk;
  call.with_statistics = args.with_statistics != 0;
  call.state = args.state;
  call.loss = static_cast<float*>(args.loss);
  call.statistics = static_cast<float*>(args.statistics);
  if (steps & kGradient) {
    call.grad = args.grad;
    call.grad_width = static_cast<int32_t>(args.grad_width);
    call.grad_is_narrower = args.grad.data == args.student.matrix.data &&
                            args.grad.dtype != OPD_FLOAT32 &&
                            args.student.matrix.dtype == OPD_FLOAT32;
  }
  std::copy(args.components, args.components + args.num_components, call.components);
  return call;
}

bool is_plain(const Side& side) {
  return side.bias == nullptr && side.scale == 1.0f && side.softcap == 0.0f;
}

bool is_plain(const Call& call) {
  constexpr unsigned kReads = kLse | kHead | kRowSums | kTerms | kGradient;
  return (call.steps & kReads) && call.num_components == 1 &&
         has_plain_kernel(call.components[0].divergence) && call.target == OPD_TARGET_TEACHER &&
         is_plain(call.student) && is_plain(call.teacher) && !call.with_statistics &&
         call.statistics == nullptr && call.labels == nullptr;
}

void run(const Call& call, const Device& device, void* stream) {
  // enough for any balance; more rows than that are walked
  const int64_t blocks = std::min<int64_t>(call.num_tokens, int64_t{1024} * device.multiprocessors);
  is_plain(call) ? launch_plain(call, blocks, stream) : launch_general(call, blocks, stream);
}

// What every entry point does: checks, then the kernel of these steps; no tokens, no launch.
template <class Check>
opd_status_t enqueue(const opd_divergence_args_t* args, unsigned steps, void* stream,
                     Check&& check) {
  return guarded([&] {
    check_call(args);
    if (args->num_tokens == 0) return;
    Call call = call_of(*args, steps);
    check(call);
    run(call, current_device(), stream);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_divergence_fwd_cuda(const opd_divergence_args_t* args, void* stream) {
  using namespace opd::cuda;
  return enqueue(args, kForward | kStore, stream, [&](Call&) {
    opd::check_pointers(opd::kOp, "loss and state", {args->loss, args->state});
  });
}

opd_status_t opd_divergence_bwd_cuda(const opd_divergence_args_t* args, void* stream) {
  using namespace opd::cuda;
  return enqueue(args, kLoad | kGradient, stream, [&](Call& call) {
    opd::check_pointers(opd::kOp, "grad_loss, state and grad",
                        {args->grad_loss, args->state, args->grad.data});
    check_grad(*args);
    call.grad_loss = static_cast<const float*>(args->grad_loss);
    call.with_statistics = false;
    call.statistics = nullptr;
  });
}

opd_status_t opd_divergence_fwd_grad_cuda(const opd_divergence_args_t* args, void* stream) {
  using namespace opd::cuda;
  return opd::guarded([&] {
    check_call(args);
    if (args->num_tokens == 0) return;
    OPD_CHECK(args->student.matrix.dtype == OPD_FLOAT32, opd::kOp,
              ": student_logits must be float32 to be overwritten by the gradient");
    opd::check_pointers(opd::kOp, "loss and grad", {args->loss, args->grad.data});
    check_grad(*args);
    const Device device = current_device();
    RowLaunch rows;
    if (cluster_takes(*args, device, &rows)) return forward_grad_cluster(*args, rows, stream);
    Call call = call_of(*args, kForward | kGradient);
    call.state = nullptr;
    run(call, device, stream);
  });
}

opd_status_t opd_divergence_init_cuda(const opd_divergence_args_t* args, void* stream) {
  using namespace opd::cuda;
  return enqueue(args, kInit | kStore, stream, [&](Call&) {
    opd::check_pointer(opd::kOp, "state", args->state);
  });
}

opd_status_t opd_divergence_phase_cuda(const opd_divergence_args_t* args, int32_t phase,
                                       void* stream) {
  using namespace opd::cuda;
  const unsigned after_lse = phase == OPD_PHASE_ROW_SUMS ? kRowSums : kTerms;
  const unsigned step = phase == OPD_PHASE_LSE ? kLse : after_lse;
  return enqueue(args, kLoad | step | kStore, stream, [&](Call& call) {
    opd::check_pointer(opd::kOp, "state", args->state);
    OPD_CHECK(phase >= OPD_PHASE_LSE && phase <= OPD_PHASE_TERMS, opd::kOp,
              ": phase must be an opd_divergence_phase_t, got ", phase);
    for (int j = 0; j < args->num_components; ++j) {
      OPD_CHECK(!opd::needs_threshold(args->components[j]), opd::kOp,
                ": adaptive_kl sorts the teacher's law and needs whole rows");
    }
    call.statistics = nullptr;  // written at the end
  });
}

opd_status_t opd_divergence_close_lse_cuda(const opd_divergence_args_t* args, void* stream) {
  using namespace opd::cuda;
  return enqueue(args, kLoad | kCloseLse | kStore, stream, [&](Call&) {
    opd::check_pointer(opd::kOp, "state", args->state);
  });
}

opd_status_t opd_divergence_finish_cuda(const opd_divergence_args_t* args, void* stream) {
  using namespace opd::cuda;
  return enqueue(args, kLoad | kFinish, stream, [&](Call&) {
    opd::check_pointers(opd::kOp, "loss and state", {args->loss, args->state});
  });
}
