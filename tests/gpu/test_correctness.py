# SPDX-License-Identifier: Apache-2.0
"""At the size of real models, against float64: losses, dX and dW, and every divergence's rows."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks.gpu import cases
from opd_kernels import reference
from tests import eager
from tests.cases import SPECS, spec
from tests.checks import leaf, upstream
from tests.gpu.conftest import DRY_RUN, logits_of
from tests.tolerance import assert_within_eager

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned")]
# of Triton, whose compiler takes seconds for each; the rest is interpreted in tests/opd_kernels
COMPILED = (*cases.DIVERGENCES, "alpha", "cross_entropy", "skew_forward_kl")
SETTLED = ("total_variation", "adaptive_kl")


@functools.cache
def problem(device, shape: cases.Shape, operands: torch.dtype) -> cases.Inputs:
    """The same inputs for every divergence and backend."""
    return cases.inputs_of(device, shape, operands).with_head("trained")


@functools.cache
def gradients_by_slices(device, shape, operands, name: str, dtype, step: int) -> list[Tensor]:
    """[loss, dX, dW] of the textbook formula in `dtype`, a slice of tokens at a time."""
    inputs = problem(device, shape, operands)
    params = {"beta": 0.5} if name == "jsd" else {}
    divergence = spec(name, **params)
    formula = reference.divergence if dtype == torch.float64 else eager.divergence
    own_head, teacher_head = inputs[1].detach(), inputs[3]
    head = own_head.to(dtype)
    losses, grad_hidden = [], []
    grad_head = torch.zeros_like(head)
    for begin in range(0, inputs[0].shape[0], step):
        rows = slice(begin, begin + step)
        hidden = inputs[0].detach()[rows]
        logits = logits_of(device, hidden, own_head, dtype).requires_grad_()
        teacher_logits = logits_of(device, inputs[2][rows], teacher_head, dtype)
        loss = formula(logits, teacher_logits, divergence=divergence)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        losses.append(loss.detach())
        grad_hidden.append(gradient @ head)
        grad_head.addmm_(gradient.t(), hidden.to(dtype))
    return [torch.cat(losses), torch.cat(grad_hidden), grad_head]


@pytest.mark.parametrize(
    ("name", "operands"),
    [*((name, torch.bfloat16) for name in cases.DIVERGENCES), ("reverse_kl", torch.float32)],
    ids=str,
)
def test_fused_linear_divergence_at_real_size(device, sizes, backend, name, operands):
    shape = sizes.of_operands(operands)
    inputs = problem(device, shape, operands)
    options = {"backend": backend, "workspace_bytes": sizes.workspace_bytes, "divergence": name}
    with torch.no_grad():
        per_token = opk.fused_linear_divergence(*inputs, reduction="none", **options).loss
    loss = opk.fused_linear_divergence(*inputs, **options).loss
    actual = [per_token, *torch.autograd.grad(loss, inputs[:2])]
    truth, baseline = (
        gradients_by_slices(device, shape, operands, name, dtype, sizes.slice_tokens)
        for dtype in (torch.float64, torch.float32)
    )
    for what, got, eager_value, exact in zip(
        ("loss", "dX", "dW"), actual, baseline, truth, strict=True
    ):
        # what eager's autograd would return: a gradient in the dtype of its tensor
        assert_within_eager(got, eager_value.to(got.dtype), exact, f"{backend} {name} {what}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_every_divergence_of_rows(device, sizes, backend, divergence, dtype):
    if divergence.name in SETTLED:
        pytest.skip("its kinks need the settling of tests/opd_kernels/test_divergence.py")
    if DRY_RUN and divergence.name not in COMPILED:
        pytest.skip("tests/opd_kernels/test_divergence.py has all on a CPU")
    if backend == "triton" and (dtype != torch.float32 or divergence.name not in COMPILED):
        pytest.skip("not compiled here: tests/opd_kernels/test_triton_divergences.py has all")
    generator = device.generator(0)

    def logits() -> Tensor:
        values = torch.randn(*sizes.row, generator=generator, device=device.kind)
        return (2.0 * values - 10.0).to(dtype)

    teacher = logits()
    student = (teacher.float() + logits().float() + 10.0).to(dtype)
    grad_loss = upstream(sizes.row[0]).to(device.kind)

    def run(function, student_dtype, **options) -> tuple[Tensor, Tensor]:
        own = leaf(student, student_dtype)
        loss = function(own, teacher, **options)
        loss.backward(grad_loss.to(loss.dtype))
        return loss.detach(), own.grad

    actual = run(opk.divergence, dtype, divergence=divergence.public(), backend=backend)
    baseline = run(eager.divergence, dtype, divergence=divergence)
    truth = run(reference.divergence, torch.float64, divergence=divergence)
    for what, got, eager_value, exact in zip(
        ("loss", "gradient"), actual, baseline, truth, strict=True
    ):
        assert_within_eager(got, eager_value, exact, f"{backend} {divergence} {what}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_logprobs_of_rows(device, sizes, backend, dtype):
    logits = torch.randn(*sizes.row, generator=device.generator(0), device=device.kind).to(dtype)
    ids = torch.arange(sizes.row[0], device=device.kind) * 13

    def run(function, own_dtype, **options):
        own = leaf(logits, own_dtype)
        found = function(own, ids, **options)
        (2.0 * found[0] + found[1] - found[2]).sum().backward()
        return (*(value.detach() for value in found), own.grad)

    actual = run(opk.token_logprobs, dtype, backend=backend)
    baseline, truth = run(eager.token_logprobs, dtype), run(reference.token_logprobs, torch.float64)
    names = ("logprobs", "lse", "entropy", "gradient")
    for what, got, eager_value, exact in zip(names, actual, baseline, truth, strict=True):
        assert_within_eager(got, eager_value, exact, f"{backend} {what}")
