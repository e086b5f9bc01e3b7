# SPDX-License-Identifier: Apache-2.0
"""Rows of logits in a GPU's buffers are aligned whatever the vocabulary, in every fused op."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _buffers, _gemms
from tests.cases import BF16, F32
from tests.checks import dtype_id, laws_of, leaf
from tests.gpu_paths import cut_as_on_a_gpu
from tests.native import needs_kernels

pytestmark = [needs_kernels("divergence"), pytest.mark.usefixtures("emulated_cuda")]

TOKENS, VOCAB, OTHER_VOCAB, WIDTH = 6, 301, 295, 16


def divergence(hidden, head, teacher_hidden, teacher_head):
    return opk.fused_linear_divergence(
        hidden, head, teacher_hidden, teacher_head[:VOCAB], backend="cuda"
    ).loss


def divergence_in_slices(hidden, head, teacher_hidden, teacher_head):
    return opk.fused_linear_divergence(
        hidden, head, teacher_hidden, teacher_head[:VOCAB], workspace_bytes=10_000, backend="cuda"
    ).loss


def divergence_of_few_columns(hidden, head, teacher_hidden, teacher_head):
    return opk.fused_linear_divergence(
        hidden, head, teacher_hidden, teacher_head[:VOCAB], gradient_tolerance=1e-12,
        backend="cuda",
    ).loss  # fmt: skip


def overlap_divergence(hidden, head, teacher_hidden, teacher_head):
    ids = torch.arange(50), torch.arange(50).flip(0)
    return opk.fused_linear_overlap_divergence(
        hidden, head, teacher_hidden, teacher_head[:OTHER_VOCAB], *ids, backend="cuda"
    ).loss


def sorted_l1(hidden, head, teacher_hidden, teacher_head):
    return opk.fused_linear_sorted_l1(hidden, head, teacher_hidden, teacher_head[:OTHER_VOCAB]).loss


def topk_divergence(hidden, head, *_):
    ids = torch.arange(4, dtype=torch.int32).expand(TOKENS, 4)
    logprobs = torch.full((TOKENS, 4), -2.0)
    return opk.fused_linear_topk_divergence(hidden, head, ids, logprobs, backend="cuda").loss


def token_logprobs(hidden, head, *_):
    ids = torch.arange(TOKENS)
    return opk.fused_linear_token_logprobs(hidden, head, ids, backend="cuda").logprobs.sum()


def topk(hidden, head, *_):
    return opk.fused_linear_topk(
        hidden.detach(), head.detach(), num_topk=5, backend="cuda"
    ).logprobs


def sample_tokens(hidden, head, *_):
    uniforms = torch.linspace(0.05, 0.95, 3 * TOKENS, dtype=torch.float64).view(TOKENS, 3)
    samples = opk.fused_linear_sample_tokens(
        hidden.detach(), head.detach(), uniforms, backend="cuda"
    )
    return samples.lse


def speculative_verify(hidden, head, teacher_hidden, teacher_head):
    drafts, places = torch.zeros(2, 2, dtype=torch.int64), (2, 3, WIDTH)
    uniforms = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).view(2, 3)
    verdict = opk.fused_linear_speculative_verify(
        drafts, hidden.detach()[:4].view(2, 2, WIDTH), head.detach(), teacher_hidden.view(places),
        teacher_head[:VOCAB], uniforms=uniforms, backend="cuda",
    )  # fmt: skip
    # not a number after the place that ends a verdict
    return verdict.teacher_logprobs.nan_to_num(0.0)


def run(call, dtype):
    """What a call returns, and the gradients of its hidden states and head where it has any."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, head = leaf(normal(TOKENS, WIDTH)), leaf(normal(VOCAB, WIDTH))
    result = call(hidden, head, normal(TOKENS, WIDTH), normal(VOCAB, WIDTH))
    if result.requires_grad:
        result.backward()
    return [result.detach(), *(x.grad for x in (hidden, head) if x.grad is not None)]


@pytest.fixture
def seen(monkeypatch):
    """The logits that are formed, and the dZ that goes into a product, from here on."""
    cut_as_on_a_gpu(monkeypatch)
    matrices = []
    for name in ("logits_into", "grad_hidden"):
        function = getattr(_gemms, name)

        def spied(matrix, *arguments, function=function):
            matrices.append(matrix)
            return function(matrix, *arguments)

        monkeypatch.setattr(_gemms, name, spied)
    return matrices


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize(
    "call",
    [
        divergence, divergence_in_slices, divergence_of_few_columns, overlap_divergence, sorted_l1,
        topk_divergence, token_logprobs, topk, sample_tokens, speculative_verify,
    ],
    ids=lambda call: call.__name__,
)  # fmt: skip
def test_rows_of_any_vocabulary_are_aligned_and_change_nothing(seen, monkeypatch, call, dtype):
    aligned = run(call, dtype)
    assert seen and any(matrix.shape[1] % 4 for matrix in seen)
    for matrix in seen:
        assert matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0
    seen.clear()
    monkeypatch.setattr(_buffers, "ROW_ALIGNMENT", 1)
    for got, expected in zip(aligned, run(call, dtype), strict=True):
        # one rounding of dZ and one of the result may fall to the other side
        bound = 2e-5 if got.dtype == F32 and dtype == F32 else 2e-2
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound * expected.abs().max())
    assert any(matrix.stride(0) * matrix.itemsize % 16 for matrix in seen)


@pytest.mark.parametrize("grad_dtype", [-1, 2])
def test_the_kernel_of_clusters_takes_aligned_rows_of_any_vocabulary(monkeypatch, grad_dtype):
    """Its sums run in an order of their own: other bits than the kernel of older GPUs."""
    monkeypatch.setattr(_gemms, "on_gpu", lambda tensor: True)
    student, teacher = torch.randn(2, 3, 50_257)

    def run(capability):
        monkeypatch.setenv("OPD_EMULATION_CAPABILITY", capability)
        shapes = [student.shape, teacher.shape]
        with _buffers.borrowed_buffers(student, shapes) as buffers:
            rows = [_buffers.rows_of(buffer, *student.shape) for buffer in buffers]
            for row, values in zip(rows, (student, teacher), strict=True):
                row.copy_(values)
            laws = laws_of(student, student.shape[1], divergence="jsd")
            loss, _ = torch.ops.opd_cuda.divergence_fwd_grad_(*rows, None, *laws, False, grad_dtype)
            return loss, _gemms.gradient_of(rows[0], torch.empty(0, dtype=BF16), grad_dtype).float()

    loss, gradient = run("90")
    older_loss, older_gradient = run("80")
    torch.testing.assert_close(loss, older_loss)
    torch.testing.assert_close(gradient, older_gradient, rtol=1e-2, atol=1e-7)
    assert not torch.equal(loss, older_loss)
    monkeypatch.setattr(_buffers, "ROW_ALIGNMENT", 1)
    assert torch.equal(run("90")[0], older_loss)
