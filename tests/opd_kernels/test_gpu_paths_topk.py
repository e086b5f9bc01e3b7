# SPDX-License-Identifier: Apache-2.0
"""fused_linear_topk_divergence as a GPU runs it, on the CPU: 16-bit GEMMs and dZ, split dX.

The row kernels are CUDA's under emulation and Triton's under its interpreter; the cuts are those of
a GPU at small sizes.
"""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import BF16, F16, F32, F64, FusedCase, fused_of, spec
from tests.checks import dtype_id, leaf, public, upstream
from tests.gpu_paths import cut_as_on_a_gpu, recorded_plans, with_rounded_gradient
from tests.native import needs_kernels
from tests.options import LAW_OPTIONS, law_options_of
from tests.row_kernels.gpu import CUDA, TRITON
from tests.sparse import TAILS, eager_topk_divergence
from tests.tolerance import assert_within_eager

pytestmark = [
    needs_kernels("topk_divergence", "divergence"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
CASE = FusedCase("gpu", 21, 301, 16, 24, weights="some_zero")
NUM_IDS = 8
ONE_CHUNK, SEVERAL = 1 << 20, 40_000
every_reduction = pytest.mark.parametrize("reduction", ["sum", "none"])
every_width = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)


# the interpreter takes seconds a case, and test_triton_topk_divergence.py holds its kernels
@pytest.fixture(
    params=["cuda", pytest.param("triton", marks=[pytest.mark.triton, pytest.mark.slow])]
)
def gpu(request, monkeypatch):
    """Either backend, and cuts as on a GPU at a hundredth of its sizes."""
    is_cuda = request.param == "cuda"
    request.getfixturevalue("emulated_cuda" if is_cuda else "interpreted_triton")
    cut_as_on_a_gpu(monkeypatch)
    return CUDA if is_cuda else TRITON


@pytest.fixture
def plans(monkeypatch):
    return recorded_plans(monkeypatch)


def teacher_of(inputs, num_ids=NUM_IDS):
    """(ids, logprobs) of the teacher's best, one id twice and one missing."""
    logits = inputs.teacher_hidden.float() @ inputs.teacher_lm_head_weight.float().T
    logprobs, ids = logits.nan_to_num().log_softmax(-1).topk(num_ids)
    ids[0, 3], ids[-1, 2] = ids[0, 1], -1
    return ids.to(torch.int32), logprobs


def eager_fused(
    hidden, head, *teacher, token_weights=None, student_bias=None, student_lora=None, **keywords
):
    """Eager torch with float32 logits whose gradient is rounded to the head's width."""
    logits = eager._logits(hidden, head, token_weights, None, student_bias, student_lora)
    names = {"student_softcap": "softcap", "student_logit_scale": "logit_scale"}
    keywords = {names.get(name, name): value for name, value in keywords.items()}
    logits = with_rounded_gradient(logits, hidden.dtype)
    return eager_topk_divergence(logits, *teacher, token_weights=token_weights, **keywords)


def check_fused(gpu, dtype, divergence, tail, reduction, workspace_bytes, bent=False, option=None):
    """Loss and every gradient by the tolerance rule."""
    inputs = fused_of(CASE, dtype)
    teacher = teacher_of(inputs)
    keywords = {"divergence": divergence, "tail": tail, "token_weights": inputs.token_weights}
    if option is not None:
        law = law_options_of(option, CASE.num_tokens)
        for name in ("softcap", "logit_scale"):
            if name in law:
                keywords[f"student_{name}"] = law[name]
        keywords["temperature"] = law.get("temperature", 1.0)
    grad_loss = upstream(CASE.num_tokens) if reduction == "none" else torch.tensor(0.3)
    generator = torch.Generator().manual_seed(5)
    extra = [
        (torch.randn(shape, generator=generator) * 0.4).to(dtype)
        for shape in ((301,), (4, 16), (301, 4))
    ]

    def run(function, student_dtype, **changes):
        tensors = [*inputs.tensors()[:2], *(extra if bent else ())]
        leaves = [leaf(tensor, student_dtype) for tensor in tensors]
        more = {}
        if bent:
            more = {"student_bias": leaves[2], "student_lora": (*leaves[3:], 0.6)}
        loss = function(*leaves[:2], *teacher, **(keywords | more | changes))
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        if reduction == "sum" and loss.dim():
            loss = loss.sum()
        loss.backward(grad_loss.to(loss.dtype))
        return loss.detach(), *(one.grad for one in leaves)

    truth = run(reference.fused_linear_topk_divergence, F64, reduction=reduction)
    baseline = run(eager_fused, dtype)
    actual = run(
        opk.fused_linear_topk_divergence,
        dtype,
        divergence=public(divergence),
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        backend=gpu.name,
    )
    names = ["loss", "dX", "dW", "bias", "A", "B"]
    what = f"{gpu.name} {divergence} {tail} {option} {dtype_id(dtype)} {reduction}"
    for name, got, eager_value, exact in zip(names, actual, baseline, truth, strict=False):
        assert_within_eager(got, eager_value, exact, f"{what} {name}")
    masked = inputs.token_weights == 0
    assert bool((actual[1][masked] == 0).all())


@every_reduction
@every_width
@pytest.mark.parametrize("workspace_bytes", [ONE_CHUNK, SEVERAL])
def test_fused_linear_topk_divergence_matches_reference(
    gpu, plans, workspace_bytes, dtype, reduction
):
    check_fused(gpu, dtype, spec("forward_kl"), "bucket", reduction, workspace_bytes)
    for plan in plans:
        assert plan.grad_hidden_splits > 1
        assert (plan.num_chunks > 1) == (workspace_bytes == SEVERAL)


@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=pytest.mark.slow), BF16], ids=dtype_id)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_every_tail_matches_reference(gpu, name, tail, dtype):
    if (name, tail) == ("reverse_kl", "renormalize_teacher"):
        name = "skew_reverse_kl"
    params = {"jsd": {"beta": 0.3}, "skew_reverse_kl": {"alpha": 0.2}}.get(name, {})
    check_fused(gpu, dtype, spec(name, **params), tail, "sum", SEVERAL)


@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=pytest.mark.slow), F16], ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_bent_heads_match_reference(gpu, option, dtype):
    check_fused(gpu, dtype, spec("reverse_kl"), "bucket", "sum", SEVERAL, bent=True, option=option)


def run_fused(gpu, inputs, dtype, **keywords):
    """(loss, dX, dW, statistics)."""
    hidden, head = (leaf(tensor, dtype) for tensor in inputs.tensors()[:2])
    out = opk.fused_linear_topk_divergence(
        hidden, head, *teacher_of(inputs), backend=gpu.name, **keywords
    )
    (out.loss.sum() * keywords.get("grad_scale", 1.0)).backward()
    return out.loss.detach(), hidden.grad, head.grad, out.statistics


@pytest.mark.parametrize("dtype", [BF16], ids=dtype_id)
def test_masked_tokens_that_are_not_taken_out_change_nothing(gpu, dtype):
    inputs = fused_of(CASE, dtype)
    keywords = {"token_weights": inputs.token_weights, "statistics": ("student_entropy",)}
    compact = run_fused(gpu, inputs, dtype, compact_tokens=True, **keywords)
    whole = run_fused(gpu, inputs, dtype, compact_tokens=False, **keywords)
    masked = inputs.token_weights == 0
    assert bool((whole[1][masked] == 0).all())
    assert bool((whole[3]["student_entropy"][masked] == 0).all())
    tolerance = {"rtol": 1e-5 if dtype == F32 else 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    for one, two in zip(compact[:3], whole[:3], strict=True):
        torch.testing.assert_close(one, two, **tolerance)


@pytest.mark.parametrize("dtype", [F16], ids=dtype_id)
def test_head_gradients_go_to_a_float32_sum(gpu, dtype):
    inputs = fused_of(CASE, dtype)
    keywords = {"token_weights": inputs.token_weights, "workspace_bytes": SEVERAL}
    _, grad_hidden, grad_head, _ = run_fused(gpu, inputs, dtype, **keywords)
    total = torch.ones(301, 16)
    keywords |= {"student_lm_head_weight_grad": total, "grad_scale": 0.5}
    _, halved, nothing, _ = run_fused(gpu, inputs, dtype, **keywords)
    assert nothing is None
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(2 * halved, grad_hidden, rtol=2 * eps, atol=1e-6)
    largest = float(grad_head.abs().max())
    torch.testing.assert_close(
        2 * (total - 1), grad_head.float(), rtol=2 * eps, atol=2 * eps * largest
    )


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_float16_gradients_of_small_weights_are_as_accurate_as_of_ones(gpu, tail):
    inputs = fused_of(FusedCase("small_weights", 12, 301, 16, 24), F16)

    def run(weight):
        hidden, head = (leaf(tensor) for tensor in inputs.tensors()[:2])
        out = opk.fused_linear_topk_divergence(
            hidden, head, *teacher_of(inputs), tail=tail, backend=gpu.name,
            token_weights=torch.full((12,), weight),
        )  # fmt: skip
        (out.loss / weight).backward()
        return out.loss.detach() / weight, hidden.grad, head.grad

    ones = run(1.0)
    assert bool((ones[2] != 0).any())
    # a power of two, so that nothing but range could make a difference
    for one, two in zip(run(2.0**-20), ones, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("dtype", "number"), [(F32, -1), (BF16, 2), (F16, 3)])
def test_row_kernels_write_gradients_as_wide_as_the_head(gpu, monkeypatch, dtype, number):
    seen = []
    rows = gpu.ops

    class Rows:
        def __getattr__(self, name):
            return getattr(rows, name)

        @staticmethod
        def topk_divergence_bwd_(*arguments):
            seen.append(arguments[-1])
            return rows.topk_divergence_bwd_(*arguments)

    monkeypatch.setattr("opd_kernels._dispatch.row_ops", lambda backend: Rows())
    run_fused(gpu, fused_of(FusedCase("width", 4, 50, 8, 8), dtype), dtype)
    assert seen == [number]


def test_a_tail_below_float32_keeps_its_gradient(gpu):
    # q_tail = e^-120: no float32 holds it, and its forward_kl is all that the loss is about
    hidden, head = torch.eye(16)[:2].clone(), torch.zeros(301, 16)
    head[:NUM_IDS] = 60.0
    head[NUM_IDS:] = -60.0 - torch.arange(301 - NUM_IDS).unsqueeze(1) / 301
    ids = torch.arange(NUM_IDS).expand(2, NUM_IDS)
    logprobs = torch.full((2, NUM_IDS), 0.5 / NUM_IDS).log()

    def run(function, dtype, **more):
        leaves = [leaf(tensor, dtype) for tensor in (hidden, head)]
        function(*leaves, ids, logprobs, **more).loss.backward()
        return [one.grad for one in leaves]

    truth = run(reference.fused_linear_topk_divergence, F64)
    actual = run(opk.fused_linear_topk_divergence, F32, backend=gpu.name)
    for got, exact in zip(actual, truth, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)
    assert bool((actual[1][NUM_IDS:].abs() > 0).any())
