// SPDX-License-Identifier: Apache-2.0
// The logits of a student come from a GEMM on a stream of our own, the divergence and its gradient
// follow on that stream in place of the logits, and the CPU's entry point checks them.
#include <cuda_runtime.h>
#include <opd/opd.h>

#include <cmath>
#include <cstdio>
#include <vector>

namespace {

constexpr int kTokens = 4, kHidden = 64, kVocabulary = 5000;

#define CHECK_CUDA(call)                                             \
  do {                                                               \
    const cudaError_t error = (call);                                \
    if (error != cudaSuccess) {                                      \
      std::printf("%s: %s\n", #call, cudaGetErrorString(error));     \
      return 1;                                                      \
    }                                                                \
  } while (false)

#define CHECK_OPD(call)                                              \
  do {                                                               \
    if ((call) != OPD_OK) {                                          \
      std::printf("%s: %s\n", #call, opd_last_error());              \
      return 1;                                                      \
    }                                                                \
  } while (false)

// logits[t, v] = hidden[t] . head[v]; in a program this is cuBLAS.
__global__ void lm_head(const float* hidden, const float* head, float* logits) {
  const int v = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y;
  if (v >= kVocabulary) return;
  float sum = 0.0f;
  for (int d = 0; d < kHidden; ++d) sum += hidden[t * kHidden + d] * head[v * kHidden + d];
  logits[static_cast<int64_t>(t) * kVocabulary + v] = sum;
}

std::vector<float> numbers(size_t count, unsigned seed) {
  std::vector<float> result(count);
  for (float& value : result) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;  // in [-1, 1)
  }
  return result;
}

// What both calls share: reverse KL of kTokens rows, the gradient in the place of the student.
opd_divergence_args_t args_of(float* student, float* teacher, float* loss,
                              const opd_divergence_component_t* component) {
  opd_divergence_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = kTokens;
  args.vocab_size = kVocabulary;
  args.student.matrix = {student, kVocabulary, OPD_FLOAT32};
  args.teacher.matrix = {teacher, kVocabulary, OPD_FLOAT32};
  args.student.scale = args.teacher.scale = 1.0;
  args.student.temperature = args.teacher.temperature = 1.0;
  args.components = component;  // host memory, in both calls
  args.num_components = 1;
  args.loss = loss;
  args.grad = {student, kVocabulary, OPD_FLOAT32};
  args.grad_width = kVocabulary;
  return args;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: nothing was run\n");
    return 0;
  }
  const std::vector<float> hidden = numbers(kTokens * kHidden, 1);
  const std::vector<float> head = numbers(size_t(kVocabulary) * kHidden, 2);
  std::vector<float> teacher = numbers(size_t(kTokens) * kVocabulary, 3);
  const size_t logits_bytes = teacher.size() * sizeof(float);

  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  float *d_hidden, *d_head, *d_student, *d_teacher, *d_loss;
  CHECK_CUDA(cudaMalloc(&d_hidden, hidden.size() * sizeof(float)));
  CHECK_CUDA(cudaMalloc(&d_head, head.size() * sizeof(float)));
  CHECK_CUDA(cudaMalloc(&d_student, logits_bytes));
  CHECK_CUDA(cudaMalloc(&d_teacher, logits_bytes));
  CHECK_CUDA(cudaMalloc(&d_loss, kTokens * sizeof(float)));
  CHECK_CUDA(cudaMemcpyAsync(d_hidden, hidden.data(), hidden.size() * sizeof(float),
                             cudaMemcpyHostToDevice, stream));
  CHECK_CUDA(cudaMemcpyAsync(d_head, head.data(), head.size() * sizeof(float),
                             cudaMemcpyHostToDevice, stream));
  CHECK_CUDA(cudaMemcpyAsync(d_teacher, teacher.data(), logits_bytes, cudaMemcpyHostToDevice,
                             stream));

  const dim3 grid((kVocabulary + 255) / 256, kTokens);
  lm_head<<<grid, 256, 0, stream>>>(d_hidden, d_head, d_student);
  CHECK_CUDA(cudaGetLastError());
  // the logits before the call overwrites them, for the CPU
  std::vector<float> student(teacher.size());
  CHECK_CUDA(cudaMemcpyAsync(student.data(), d_student, logits_bytes, cudaMemcpyDeviceToHost,
                             stream));

  const opd_divergence_component_t component = {OPD_REVERSE_KL, 0.0, 0.0, nullptr};
  const opd_divergence_args_t on_gpu = args_of(d_student, d_teacher, d_loss, &component);
  CHECK_OPD(opd_divergence_fwd_grad_cuda(&on_gpu, stream));

  std::vector<float> loss(kTokens), grad(teacher.size());
  CHECK_CUDA(cudaMemcpyAsync(loss.data(), d_loss, kTokens * sizeof(float), cudaMemcpyDeviceToHost,
                             stream));
  CHECK_CUDA(cudaMemcpyAsync(grad.data(), d_student, logits_bytes, cudaMemcpyDeviceToHost, stream));
  CHECK_CUDA(cudaStreamSynchronize(stream));

  std::vector<float> expected(kTokens);
  const opd_divergence_args_t on_cpu =
      args_of(student.data(), teacher.data(), expected.data(), &component);
  CHECK_OPD(opd_divergence_fwd_grad_cpu(&on_cpu));
  double worst_loss = 0.0, worst_grad = 0.0, largest = 0.0;
  for (int t = 0; t < kTokens; ++t) {
    std::printf("token %d: reverse KL %.6f nats\n", t, loss[t]);
    worst_loss = std::fmax(worst_loss, std::fabs(loss[t] - expected[t]) / expected[t]);
  }
  for (size_t i = 0; i < grad.size(); ++i) {
    worst_grad = std::fmax(worst_grad, std::fabs(grad[i] - student[i]));
    largest = std::fmax(largest, std::fabs(student[i]));
  }
  std::printf("from the CPU: loss %.1e, gradient %.1e of its largest entry\n", worst_loss,
              worst_grad / largest);
  CHECK_CUDA(cudaFree(d_hidden));
  CHECK_CUDA(cudaFree(d_head));
  CHECK_CUDA(cudaFree(d_student));
  CHECK_CUDA(cudaFree(d_teacher));
  CHECK_CUDA(cudaFree(d_loss));
  CHECK_CUDA(cudaStreamDestroy(stream));
  if (!(worst_loss < 1e-5 && worst_grad < 1e-5 * largest)) {
    std::printf("FAILED: expected less than 1e-5\n");
    return 1;
  }
  std::printf("ok, opd %s\n", opd_version());
  return 0;
}
