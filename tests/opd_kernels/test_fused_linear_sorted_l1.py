# SPDX-License-Identifier: Apache-2.0
"""opk.fused_linear_sorted_l1 on CPU: truth, chunks, memory, frozen sides, compile, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import opd_kernels as opk
from opd_kernels import _gemms, _ranks, reference
from tests.cases import BF16, F16, F32, F64
from tests.checks import dtype_id, leaf, upstream
from tests.memory import peak_bytes
from tests.sorted_laws import assert_no_kinks, eager_sorted_l1
from tests.tolerance import assert_within_eager

NAN = float("nan")
ROWS, STUDENT, TEACHER = 19, (211, 16), (340, 12)
NAMES = ("loss", "student_hidden", "student_lm_head_weight", "student_bias", "student_log_scales")
NAMES_OF_A_MODEL = ("hidden", "lm_head_weight")
# a chunk of a few rows; the sort's own memory is the larger part
SMALL = 40_000


def tensors_of(dtype: torch.dtype, num_rows: int = ROWS, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "student_hidden": randn(num_rows, STUDENT[1]),
        "student_lm_head_weight": randn(*STUDENT) / 2,
        "teacher_hidden": randn(num_rows, TEACHER[1]),
        "teacher_lm_head_weight": randn(*TEACHER) / 2,
        "student_bias": randn(STUDENT[0]),
        "teacher_bias": randn(TEACHER[0]),
        "student_log_scales": -randn(num_rows).abs().to(torch.promote_types(dtype, F32)),
    }


def options_of(num_rows: int = ROWS) -> dict:
    """Every option: 60 pairs, a weight of 0 in each third row, two rows of padding in a head."""
    return {
        "pairs": (torch.arange(60).flip(0), torch.arange(100, 160)),
        "pair_weight": 0.4,
        "beta": 0.3,
        "temperature": (torch.linspace(0.7, 1.4, num_rows), 1.1),
        "token_weights": (torch.arange(num_rows) % 3).float() / 2,
        "student_softcap": 6.0,
        "teacher_logit_scale": 0.8,
        "student_vocab_size": STUDENT[0] - 2,
    }


def run(function, tensors, dtype, reduction="sum", **options):
    """Loss and the gradients of everything that has one."""
    tensors = dict(tensors)
    real = torch.promote_types(dtype, F32)
    for name in NAMES[1:]:
        tensors[name] = leaf(tensors[name], real if name == "student_log_scales" else dtype)
    loss = function(**tensors, reduction=reduction, **options).loss
    loss.backward(upstream(len(loss)).to(loss.dtype) if reduction == "none" else None)
    return loss.detach(), *(tensors[name].grad for name in NAMES[1:])


class Eager:
    """The loss on whole logits in float32 (float64)."""

    def __init__(self, **tensors) -> None:
        options = tensors
        sides = []
        for side in ("student", "teacher"):
            hidden, head, bias = (
                options.pop(f"{side}_{name}") for name in ("hidden", "lm_head_weight", "bias")
            )
            real = torch.promote_types(hidden.dtype, F32)
            weights = options.get("token_weights")
            if weights is not None:
                hidden = hidden.masked_fill((weights == 0).unsqueeze(1), 0.0)
            sides.append(hidden.to(real) @ head.to(real).T + bias.to(real))
        reduction = options.pop("reduction")
        self.logits, self.options = sides, options
        loss = eager_sorted_l1(*sides, **options)
        self.loss = loss.sum() if reduction == "sum" else loss


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("with_options", [False, True], ids=["plain", "options"])
def test_matches_reference_whole_and_in_chunks(with_options, dtype, reduction):
    tensors, options = tensors_of(dtype), options_of() if with_options else {}
    eager = Eager(**tensors, reduction="sum", **options)
    assert_no_kinks(*eager.logits, **eager.options)
    truth = run(reference.fused_linear_sorted_l1, tensors, F64, reduction, **options)
    plain = run(Eager, tensors, dtype, reduction, **options)
    for more in ({}, {"workspace_bytes": SMALL}, {"compact_tokens": False}):
        actual = run(opk.fused_linear_sorted_l1, tensors, dtype, reduction, **options, **more)
        for name, got, baseline, exact in zip(NAMES, actual, plain, truth, strict=True):
            assert_within_eager(got, baseline, exact, f"{dtype_id(dtype)} {reduction} {name}")


def test_small_budgets_are_kept():
    tensors, budget = tensors_of(F64, 400), 100_000
    tensors = {name: value.detach() for name, value in tensors.items()}
    scratch = _ranks.scratch(tensors["student_hidden"], STUDENT[0], TEACHER[0])
    outputs = 8 * (2 * 400 + 4)
    peak = peak_bytes(lambda: opk.fused_linear_sorted_l1(**tensors, workspace_bytes=budget))
    # 1.8 MB of whole logits; a scratch of which no more than one lives at a time
    assert scratch.per_call < budget
    assert peak <= budget + outputs + 2048, (peak, budget)
    four = [tensors[f"{side}_{x}"] for side in ("student", "teacher") for x in NAMES_OF_A_MODEL]
    told = opk.explain("fused_linear_sorted_l1", *four, workspace_bytes=budget)
    assert "backend 'cpu'" in told and "of 400 tokens" in told and "path A: 1 chunk" not in told
    with pytest.raises(ValueError, match="workspace_bytes must be at least"):
        opk.fused_linear_sorted_l1(**tensors, workspace_bytes=scratch.per_call)


def test_a_frozen_head_has_no_buffer_and_nothing_wanted_costs_one_forward():
    tensors = tensors_of(F32, 64)
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes = [x.shape for x in torch.utils._pytree.tree_leaves(out) if hasattr(x, "shape")]
            products.extend(shapes)
            return out

    tensors["student_hidden"].requires_grad_()
    with Watch():
        opk.fused_linear_sorted_l1(**tensors).loss.backward()
    assert torch.Size(STUDENT) not in products
    assert tensors["student_hidden"].grad.abs().sum() > 0
    del products[:]
    tensors["student_hidden"] = tensors["student_hidden"].detach()
    with Watch():
        loss = opk.fused_linear_sorted_l1(**tensors)
    assert not loss.loss.requires_grad
    assert tensors["student_hidden"].shape not in products


def test_no_rows_masked_rows_and_a_dead_teacher():
    for num_rows, weights in ((0, None), (5, torch.zeros(5))):
        tensors = tensors_of(F32, num_rows)
        if num_rows:
            tensors["teacher_hidden"].fill_(NAN)
            tensors["student_hidden"].fill_(NAN)
        for reduction in ("sum", "none"):
            for compact in (None, False):
                found = run(
                    opk.fused_linear_sorted_l1,
                    tensors,
                    F32,
                    reduction,
                    token_weights=weights,
                    compact_tokens=compact,
                )
                for value in found:
                    assert bool((value == 0).all())
                assert found[2].shape == STUDENT


def test_sums_are_the_same_bit_for_bit_and_upstream_gradients_scale():
    tensors = tensors_of(F32)
    first, again = (run(opk.fused_linear_sorted_l1, tensors, F32) for _ in range(2))
    for got, expected in zip(first, again, strict=True):
        assert torch.equal(got, expected)

    def tripled(**keywords):
        output = opk.fused_linear_sorted_l1(**keywords)
        return output._replace(loss=3.0 * output.loss)

    for got, expected in zip(run(tripled, tensors, F32)[1:], first[1:], strict=True):
        torch.testing.assert_close(got, 3.0 * expected, rtol=1e-6, atol=0)
    output = opk.fused_linear_sorted_l1(**tensors)
    torch.testing.assert_close(output.row_losses.sum(), output.loss)


def test_gradients_on_a_gpus_path_match(monkeypatch):
    """dZ of a 16-bit head is rounded in the memory of the teacher's logits."""
    tensors = tensors_of(BF16)
    expected = run(opk.fused_linear_sorted_l1, tensors, BF16)
    monkeypatch.setattr(_gemms, "on_gpu", lambda tensor: True)
    actual = run(opk.fused_linear_sorted_l1, tensors, BF16)
    for got, exact in zip(actual, expected, strict=True):
        scale = float(exact.abs().max())
        torch.testing.assert_close(got, exact, rtol=0.02, atol=0.01 * scale)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck_opcheck_and_compile(reduction):
    tensors = tensors_of(F64, 3)
    small = {
        name: value[..., :9, :4].contiguous() if value.dim() == 2 else value[:9].contiguous()
        for name, value in tensors.items()
    }
    small["student_bias"], small["teacher_bias"] = (
        torch.linspace(-1, 1, 9, dtype=F64),
        torch.linspace(0, 2, 9, dtype=F64),
    )
    leaves = [small[name].clone().requires_grad_() for name in NAMES[1:]]

    def loss(*values, dtype=None):
        given = dict(small) | dict(zip(NAMES[1:], values, strict=True))
        return opk.fused_linear_sorted_l1(**given, reduction=reduction).loss

    assert torch.autograd.gradcheck(loss, leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves).sum(), leaves)
    for got, exact in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves), expected, strict=True
    ):
        assert torch.equal(got, exact)
    found = []

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "fused_linear_sorted_l1" in str(func):
                found.append((func, args))
            return func(*args, **(kwargs or {}))

    with Catch():
        loss(*(x.detach().requires_grad_() for x in leaves)).sum().backward()
    assert len(found) == (1 if reduction == "sum" else 2)
    for func, args in found:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"teacher_hidden": torch.randn(4, 12)}, ValueError, "teacher_hidden must have 19 rows"),
        ({"reduction": "mean"}, ValueError, "reduction must be"),
        ({"student_bias": torch.randn(7)}, ValueError, "bias"),
        ({"pairs": (torch.tensor([0]), torch.tensor([340]))}, ValueError, "teacher_ids of pairs"),
        ({"workspace_bytes": 64}, ValueError, "workspace_bytes must be"),
        ({"backend": "triton"}, opk.UnsupportedBackendError, "no Triton kernel"),
    ],
)
def test_refusals(change, error, words):
    with pytest.raises(error, match=words):
        opk.fused_linear_sorted_l1(**(tensors_of(F32) | change))
