# SPDX-License-Identifier: Apache-2.0
"""The loop of losses on whole rows of two models: truth, chunks, masked rows, memory, autograd."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import _gemms, _row_chunks
from opd_kernels.token_logprobs import Law
from tests.cases import BF16, F16, F32, F64
from tests.checks import dtype_id
from tests.memory import peak_bytes
from tests.tolerance import assert_within_eager

ROWS, STUDENT, TEACHER = 37, (50, 8), (33, 12)
NAN = float("nan")


def tensors(dtype: torch.dtype, num_rows: int = ROWS) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    real = torch.promote_types(dtype, F32)
    return {
        "hidden": torch.randn(num_rows, STUDENT[1]).to(dtype),
        "head": torch.randn(STUDENT).to(dtype),
        "bias": torch.randn(STUDENT[0]).to(real),
        "scale": torch.randn(num_rows).to(real) / 4,
        "teacher_hidden": torch.randn(num_rows, TEACHER[1]).to(dtype),
        "teacher_head": torch.randn(TEACHER).to(dtype),
        "weights": torch.rand(num_rows).to(real) * (torch.arange(num_rows) % 3 > 0),
    }


def laws(values, dtype=None) -> tuple[Law, Law]:
    bias = values["bias"] if dtype is None else values["bias"].to(dtype)
    # two padded rows of the student's head
    return Law(bias, None, [1.5, 3.0, 1.0], STUDENT[0] - 2), Law(None, None, [1.0, 0.0, 2.0], 33)


def distance(student, teacher, rows, scale):
    """A loss [C] of whole rows, and of one number per row."""
    q, p = student.softmax(1)[:, :30] * scale.exp()[:, None], teacher.softmax(1)[:, :30]
    return (q - p).square().sum(1)


def whole(values, dtype):
    """Loss and gradients of plain torch in this dtype's float32 (float64), and autograd's."""
    real = torch.promote_types(dtype, F32)
    leaves = [
        values[name].to(real).requires_grad_() for name in ("hidden", "head", "bias", "scale")
    ]
    hidden, head, bias, scale = leaves
    z = 3.0 * torch.tanh(1.5 * (hidden @ head[:48].T + bias[:48]) / 3.0)
    y = values["teacher_hidden"].to(real) @ values["teacher_head"].to(real).T / 2.0
    weights = values["weights"].to(real)
    loss = torch.where(weights == 0, 0.0, weights * distance(z, y, None, scale))
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def by_autograd(function, scales):
    """A callback whose gradients are autograd's."""

    def rows(chunk):
        leaves = [chunk.student_logits.detach(), scales[chunk.rows].detach()]
        is_dead = torch.zeros(len(leaves[1]), dtype=torch.bool)
        if chunk.weights is not None:
            is_dead = chunk.weights == 0
        leaves = [leaf.requires_grad_(chunk.with_grad) for leaf in leaves]
        z = _row_chunks.law_logits(leaves[0], chunk.student_law)
        y = _row_chunks.law_logits(chunk.teacher_logits, chunk.teacher_law)
        loss = function(z, y, chunk.rows, leaves[1])
        if chunk.weights is not None:
            loss = torch.where(is_dead, 0.0, loss * chunk.weights)
        if not chunk.with_grad:
            return loss, ()
        grad_logits, grad_scales = torch.autograd.grad(loss.sum(), leaves)
        chunk.student_logits.copy_(grad_logits)
        return loss.detach(), (grad_scales.masked_fill(is_dead, 0.0),)

    return rows


def run(values, workspace_bytes=1 << 30, wanted=(True,) * 4, compact=None, weighted=True):
    student, teacher = laws(values)
    loss, sums, rows = _row_chunks.run(
        "test",
        _row_chunks.Side(values["hidden"], values["head"], student),
        _row_chunks.Side(values["teacher_hidden"], values["teacher_head"], teacher),
        by_autograd(distance, values["scale"]),
        values["weights"] if weighted else None,
        _row_chunks.Options(workspace_bytes, list(wanted), compact),
    )
    return loss, *sums, *rows


@pytest.mark.parametrize("compact", [None, False])
@pytest.mark.parametrize("workspace_bytes", [1 << 30, 1 << 13])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_gradients_by_autograd_match_whole_tensors(dtype, workspace_bytes, compact):
    values = tensors(dtype)
    if compact is False:
        # what a row of weight 0 holds reaches nothing
        for name in ("hidden", "teacher_hidden"):
            values[name][::3] = NAN
    clean = {name: torch.nan_to_num(value) for name, value in values.items()}
    truth, plain = whole(clean, F64), whole(clean, dtype)
    names = ("loss", "hidden", "head", "bias", "scale")
    actual = run(values, workspace_bytes, compact=compact)
    for name, got, eager, exact in zip(names, actual, plain, truth, strict=True):
        assert_within_eager(got, eager, exact, f"{dtype_id(dtype)} {name}")
    assert bool((actual[1][::3] == 0).all())
    assert bool((actual[2][48:] == 0).all())


def test_small_budgets_cut_rows_and_are_kept():
    values = tensors(F64, 400)
    budget = 1 << 14
    forward_only = peak_bytes(lambda: run(values, budget, wanted=(False,) * 4))
    loss, *nothing = run(values, budget, wanted=(False,) * 4)
    assert all(value.numel() == 0 for value in nothing)
    assert torch.equal(loss, run(values, budget)[0])
    torch.testing.assert_close(loss, run(values)[0], rtol=1e-12, atol=1e-14)
    # whole logits of one side alone are 150 kB; autograd's own rows are not in this plan
    assert forward_only < 6 * budget


def test_no_rows_give_exact_zeros():
    for values, weighted in ((tensors(F32, 0), False), (tensors(F32), True)):
        values["weights"] = values["weights"] * 0
        loss, hidden, head, bias, scale = run(values, weighted=weighted)
        for value in (loss, hidden, head, bias, scale):
            assert bool((value == 0).all())
        assert head.shape == STUDENT


def test_gradients_on_a_gpus_path_match(monkeypatch):
    """16-bit dZ, which is rounded in the memory of the teacher's logits."""
    monkeypatch.setattr(_gemms, "on_gpu", lambda tensor: True)
    for dtype in (BF16, F16):
        values = tensors(dtype)
        truth, plain = whole(values, F64), whole(values, F32)
        # dZ is rounded to the head's dtype before its GEMMs, once
        for got, eager, exact in zip(run(values), plain, truth, strict=True):
            assert_within_eager(got.to(dtype), eager.to(dtype).double(), exact, dtype_id(dtype))
