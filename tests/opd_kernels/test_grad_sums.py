# SPDX-License-Identifier: Apache-2.0
"""Gradients of a head that are added to the caller's own sum (a main_grad)."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.cases import BF16, F16, F32, F64, FusedCase, fused_of, token_ids_of
from tests.checks import dtype_id, laws_of, leaf, workspace_for
from tests.memory import peak_bytes

CASE = FusedCase("sums", 23, 301, 16, 24, weights="some_zero", student_padding=7, teacher_padding=7)
WORKSPACE = workspace_for(CASE, 5)
every_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)


def step(dtype, total=None, *, frozen=(), factor=1.0, **more):
    """(loss, gradients of hidden states and head) of one call and its backward."""
    inputs = fused_of(CASE, dtype)
    hidden, head = inputs.student_hidden.clone(), inputs.student_lm_head_weight.clone()
    hidden.requires_grad_("hidden" not in frozen)
    head.requires_grad_("head" not in frozen)
    if total is not None:
        more |= {"student_lm_head_weight_grad": total, "grad_scale": factor}
    out = opk.fused_linear_divergence(
        hidden,
        head,
        *inputs.tensors()[2:],
        divergence="jsd",
        workspace_bytes=WORKSPACE,
        **inputs.keywords(),
        **more,
    )
    if out.loss.requires_grad:
        (factor * out.loss).backward()
    return out, hidden.grad, head.grad


def empty_sum(dtype, value=0.0):
    inputs = fused_of(CASE, dtype)
    real = torch.promote_types(dtype, F32)
    return torch.full_like(inputs.student_lm_head_weight, value, dtype=real)


@every_dtype
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
def test_sum_is_the_gradient_of_the_head(dtype, factor):
    expected, expected_hidden, expected_head = step(dtype)
    total = empty_sum(dtype)
    out, hidden_grad, head_grad = step(dtype, total, factor=factor)
    assert head_grad is None
    assert torch.equal(out.loss, expected.loss)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(hidden_grad, factor * expected_hidden, rtol=2 * eps, atol=0)
    scale = expected_head.abs().max().item()
    torch.testing.assert_close(
        total.to(dtype), (factor * expected_head).to(dtype), rtol=2 * eps, atol=2 * eps * scale
    )
    # rows of the padding are not the op's
    assert bool((total[CASE.vocab_size :] == 0).all())


@every_dtype
def test_two_steps_add_up(dtype):
    single, total = empty_sum(dtype), empty_sum(dtype, 1.5)
    step(dtype, single, factor=0.5)
    for _ in range(2):
        step(dtype, total, factor=0.5)
    eps = torch.finfo(total.dtype).eps
    torch.testing.assert_close(total, 2 * single + 1.5, rtol=0, atol=16 * eps)
    assert bool((total[CASE.vocab_size :] == 1.5).all())


@pytest.mark.parametrize("frozen", [("hidden",), ("head",), ("hidden", "head")])
def test_sum_of_frozen_sides(frozen):
    # who passes a sum wants it, whatever autograd knows of the head
    expected = empty_sum(F32)
    step(F32, expected)
    total = empty_sum(F32)
    out, hidden_grad, head_grad = step(F32, total, frozen=frozen)
    assert torch.equal(total, expected)
    assert out.loss.requires_grad == (len(frozen) == 1)
    assert (hidden_grad is None) == ("hidden" in frozen) and head_grad is None


def test_sum_stays_where_gradients_are_off():
    total = empty_sum(F32)
    with torch.no_grad():
        out, *_ = step(F32, total)
    assert bool((total == 0).all()) and not out.loss.requires_grad


def test_sum_of_masked_tokens_is_exactly_unchanged():
    inputs = fused_of(CASE, F32)
    total = empty_sum(F32, 2.0)
    for compact in (True, False):
        opk.fused_linear_divergence(
            leaf(torch.full_like(inputs.student_hidden, float("nan"))),
            *inputs.tensors()[1:],
            vocab_size=CASE.vocab_size,
            token_weights=torch.zeros(CASE.num_tokens),
            student_lm_head_weight_grad=total,
            compact_tokens=compact,
        )
    assert bool((total == 2.0).all())


def test_sum_with_bias_low_rank_pair_and_tolerance():
    more = {"student_bias": leaf(torch.randn(CASE.vocab_size))}
    more["student_lora"] = (leaf(torch.randn(2, 16)), leaf(torch.randn(308, 2)), 0.5)
    trained = [more["student_bias"], *more["student_lora"][:2]]
    _, hidden, head = step(F32, gradient_tolerance=1e-3, **more)
    expected = [hidden, *(x.grad.clone() for x in trained)]
    for x in trained:
        x.grad = None
    total = empty_sum(F32)
    out, hidden, _ = step(F32, total, factor=0.5, gradient_tolerance=1e-3, **more)
    assert bool((out.statistics["gradient_dropped_l1"] > 0).any())
    torch.testing.assert_close(total, 0.5 * head, rtol=1e-5, atol=1e-7)
    for one, two in zip([hidden, *(x.grad for x in trained)], expected, strict=True):
        torch.testing.assert_close(one, 0.5 * two)


def test_no_other_gradient_of_the_head_exists():
    case = FusedCase("memory", 64, 8000, 64, 32)
    inputs = fused_of(case, F32)
    hidden, head = (leaf(x) for x in inputs.tensors()[:2])
    total = torch.zeros_like(head).detach()
    budget = workspace_for(case, 4)

    def run():
        opk.fused_linear_divergence(
            hidden,
            head,
            *inputs.tensors()[2:],
            workspace_bytes=budget,
            student_lm_head_weight_grad=total,
        ).loss.backward()

    run()
    hidden.grad = None
    assert peak_bytes(run) < budget + hidden.nbytes + (64 << 10) < head.nbytes


def test_another_upstream_gradient_raises():
    total = empty_sum(F32)
    inputs = fused_of(CASE, F32)

    def loss(**more):
        return opk.fused_linear_divergence(
            leaf(inputs.student_hidden),
            *inputs.tensors()[1:],
            student_lm_head_weight_grad=total,
            **inputs.keywords(),
            **more,
        ).loss

    with pytest.raises(RuntimeError, match=r"must be grad_scale = 1\.0, got 0\.5: the sum got"):
        (0.5 * loss()).backward()
    (0.5 * loss(grad_scale=0.5)).backward()
    twice = loss()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must have one backward, got a second"):
        twice.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_raises(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    inputs = fused_of(CASE, F32)
    total = empty_sum(F32)

    def loss(hidden):
        return opk.fused_linear_divergence(
            hidden,
            *inputs.tensors()[1:],
            student_lm_head_weight_grad=total,
            **inputs.keywords(),
        ).loss

    value = checkpoint(loss, leaf(inputs.student_hidden), use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="must be None inside a backward"):
        value.backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"total": torch.zeros(3, 16)}, ValueError, r"must have shape \(308, 16\) like the head"),
        ({"total": torch.zeros(308, 16).double()}, TypeError, "must have dtype torch.float32"),
        ({"total": torch.zeros(16, 308).t()}, ValueError, "must be contiguous, got strides"),
        ({"total": leaf(torch.zeros(308, 16))}, ValueError, "must not require grad"),
        ({"total": [0.0]}, TypeError, "must be a tensor, got list"),
        ({"reduction": "none"}, ValueError, "must be None with reduction='none'"),
        ({"backend": "reference"}, ValueError, "must be used without student_lm_head_weight_grad"),
        ({"factor": float("inf")}, ValueError, "grad_scale must be finite"),
        ({"factor": "1"}, TypeError, "grad_scale must be a number, got str"),
        ({"compact_tokens": 1}, TypeError, "compact_tokens must be True, False or None, got 1"),
    ],
)
def test_sum_rejects_in_words(changes, error, message):
    arguments = {"total": empty_sum(F32), **changes}
    with pytest.raises(error, match=message) as raised:
        step(F32, **arguments)
    assert str(raised.value).startswith("fused_linear_divergence: ")


def test_grad_scale_needs_a_sum():
    inputs = fused_of(CASE, F32)
    with pytest.raises(
        ValueError, match="grad_scale must be 1 without student_lm_head_weight_grad"
    ):
        opk.fused_linear_divergence(*inputs.tensors(), grad_scale=2.0, **inputs.keywords())


def test_sum_compiles_without_a_graph_break():
    inputs = fused_of(CASE, F32)

    def loss(hidden, head, total):
        return opk.fused_linear_divergence(
            hidden * 1.5,
            head,
            *inputs.tensors()[2:],
            student_lm_head_weight_grad=total,
            grad_scale=3.0,
            **inputs.keywords(),
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        hidden, head = (leaf(x) for x in inputs.tensors()[:2])
        total = empty_sum(F32, 1.0)
        (3.0 * function(hidden, head, total)).backward()
        assert head.grad is None
        results.append((hidden.grad, total))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_sum_opcheck(dtype):
    case = FusedCase("opcheck", 5, 31, 8, 6)
    inputs = fused_of(case, dtype)
    laws = laws_of(inputs.student_hidden, 31, divergence="jsd")
    total, ops = torch.zeros(31, 8), torch.ops.opd
    wanted = [True, True, False, False, False]
    options = (1 << 20, wanted, True, "", 0.0, None, "cpu")
    inputs = (*inputs.tensors(), None, None, None, None)
    torch.library.opcheck(ops.fused_linear_divergence_sum_, (total, 0.5, *inputs, *laws, *options))
    nothing = torch.empty(0)
    torch.library.opcheck(
        ops.fused_linear_divergence_attach,
        (
            torch.tensor(1.0), leaf(inputs[0]), leaf(inputs[1]), None, None, None,
            torch.randn(5, 8), nothing, nothing, nothing, [True, False, False, False], 1.0,
        ),
        # the gradient that it passes on is another op's
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


# -- token_logprobs ------------------------------------------------------------------------------


def token_step(dtype, total=None, *, compiled=False, **more):
    inputs = fused_of(FusedCase("sums_ids", 23, 301, 16, 8), dtype)
    hidden, head = (leaf(x) for x in inputs.tensors()[:2])
    ids = token_ids_of(23, 301, 3)
    mask = torch.arange(23) % 3 != 1

    def loss(hidden, head, total):
        out = opk.fused_linear_token_logprobs(
            hidden * 1.5, head, ids, lm_head_weight_grad=total, workspace_bytes=WORKSPACE, **more
        )
        return ((out.logprobs - 0.1 * out.entropy) * mask).sum()

    if compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (0.3 * loss(hidden, head, total)).backward()
    return hidden.grad, head.grad


@every_dtype
def test_token_logprobs_add_to_the_sum_in_backward(dtype):
    expected_hidden, expected = token_step(dtype)
    real = torch.promote_types(dtype, F32)
    total = torch.ones(301, 16, dtype=real)
    for step_number in (1, 2):
        hidden_grad, head_grad = token_step(dtype, total)
        assert head_grad is None and torch.equal(hidden_grad, expected_hidden)
        eps, scale = torch.finfo(dtype).eps, expected.abs().max().item()
        torch.testing.assert_close(
            (total - 1.0) / step_number, expected.to(real), rtol=eps, atol=4 * eps * (1 + scale)
        )


def test_token_logprobs_add_to_a_sum_that_has_changed_since():
    # zero_grad between forward and backward is what training loops do
    inputs = fused_of(FusedCase("sums_ids", 23, 301, 16, 8), F32)
    ids, total = token_ids_of(23, 301, 3), torch.ones(301, 16)
    head = leaf(inputs.student_lm_head_weight)
    out = opk.fused_linear_token_logprobs(
        inputs.student_hidden, head, ids, lm_head_weight_grad=total
    )
    total.zero_()
    out.logprobs.sum().backward()
    expected = leaf(head)
    opk.fused_linear_token_logprobs(inputs.student_hidden, expected, ids).logprobs.sum().backward()
    torch.testing.assert_close(total, expected.grad)


def test_token_logprobs_with_a_sum_compile_without_a_graph_break():
    expected, actual = torch.zeros(301, 16), torch.zeros(301, 16)
    eager = token_step(F32, expected)
    compiled = token_step(F32, actual, compiled=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(compiled[0], eager[0])


def test_token_logprobs_sum_opcheck():
    inputs = fused_of(FusedCase("opcheck", 5, 31, 8, 6), F32)
    hidden, head, ids = *inputs.tensors()[:2], token_ids_of(5, 31, 1)
    law, ops = (None, None, [1.0, 0.0, 1.0], 31), torch.ops.opd
    _, lse, entropy = ops.fused_linear_token_logprobs_fwd(
        hidden, head, None, None, ids, *law, None, 1 << 20, None, "cpu"
    )
    ones = torch.ones(5)
    wanted = [True, True, False, False, False]
    torch.library.opcheck(
        ops.fused_linear_token_logprobs_bwd_,
        (
            torch.zeros(31, 8), ones, ones.double(), ones, hidden, head, None, None, ids, lse,
            entropy, *law, 1 << 20, wanted, None, "cpu",
        ),
    )  # fmt: skip


def test_token_logprobs_reject_in_words():
    inputs = fused_of(FusedCase("opcheck", 5, 31, 8, 6), F32)
    call = (*inputs.tensors()[:2], token_ids_of(5, 31, 1))
    with pytest.raises(ValueError, match="lm_head_weight_grad must have shape"):
        opk.fused_linear_token_logprobs(*call, lm_head_weight_grad=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="must be used without lm_head_weight_grad"):
        opk.fused_linear_token_logprobs(
            *call, lm_head_weight_grad=torch.zeros(31, 8), backend="reference"
        )
