# SPDX-License-Identifier: Apache-2.0
"""opk.fused_linear_token_logprobs on CPU: truth, chunks, memory, frozen sides, compile, errors."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import BF16, F16, F32, F64, FUSED_CASES, FusedCase, fused_of, token_ids_of
from tests.checks import check_token_logprobs, dtype_id, leaf, workspace_for
from tests.memory import peak_bytes
from tests.options import LAW_OPTIONS, law_options_of

RELEVANT = [
    case
    for case in FUSED_CASES
    if case.weights in (None, "random") and not isinstance(case.temperature, tuple)
]
EVERY = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype_id(dtype)}")
    for case in RELEVANT
    for dtype in case.dtypes
]
SMALL = FusedCase("small", 23, 301, 16, 8)


def inputs_of(case: FusedCase, dtype: torch.dtype):
    inputs = fused_of(case, dtype)
    ids = token_ids_of(case.num_tokens, case.vocab_size, case.seed)
    return inputs.student_hidden, inputs.student_lm_head_weight, ids, inputs.vocab_size


@pytest.mark.parametrize("chunks", ["one_chunk", "many_chunks"])
@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_fused_linear_token_logprobs_matches_reference(case, dtype, chunks):
    hidden, head, ids, vocab_size = inputs_of(case, dtype)
    budget = 1 << 30 if chunks == "one_chunk" else workspace_for(case, 5)

    def run(*args, **keywords):
        return opk.fused_linear_token_logprobs(
            *args, workspace_bytes=budget, backend="cpu", **keywords
        )

    check_token_logprobs(
        run,
        eager.fused_linear_token_logprobs,
        reference.fused_linear_token_logprobs,
        [hidden, head],
        ids,
        dtype,
        f"cpu {case.name} {dtype_id(dtype)} {chunks}",
        temperature=1.0,
        vocab_size=vocab_size,
    )


def bent(function):
    """`function` with a bias and a low-rank pair among its tensors."""

    def call(hidden, head, bias, down, up, ids, **keywords):
        return function(hidden, head, ids, bias=bias, lora=(down, up, 0.6), **keywords)

    return call


def bent_tensors(case: FusedCase, dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states, head, bias, A and B."""
    hidden, head, *_ = inputs_of(case, dtype)
    generator = torch.Generator().manual_seed(case.seed)
    size, width = head.shape
    shapes = (size,), (4, width), (size, 4)
    extra = [torch.randn(shape, generator=generator).to(dtype) * 0.5 for shape in shapes]
    return [hidden, head, *extra]


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_fused_linear_token_logprobs_of_a_bent_head_matches_reference(option, dtype):
    check_token_logprobs(
        bent(
            lambda *args, **keywords: opk.fused_linear_token_logprobs(
                *args, workspace_bytes=20_000, backend="cpu", **keywords
            )
        ),
        bent(eager.fused_linear_token_logprobs),
        bent(reference.fused_linear_token_logprobs),
        bent_tensors(SMALL, dtype),
        token_ids_of(SMALL.num_tokens, 290, SMALL.seed),
        dtype,
        f"cpu {option} {dtype_id(dtype)}",
        vocab_size=290,
        **law_options_of(option, SMALL.num_tokens),
    )


def test_fused_linear_token_logprobs_of_a_bent_head_gradcheck_float64():
    case = FusedCase("gradcheck", 4, 9, 3, 2)
    leaves = [leaf(tensor) for tensor in bent_tensors(case, F64)]
    ids = token_ids_of(4, 9, 1)

    def outputs(*tensors):
        call = bent(opk.fused_linear_token_logprobs)
        options = law_options_of("law_everything", 4)
        return tuple(call(*tensors, ids, workspace_bytes=3000, **options))

    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("trained", range(5), ids=["hidden", "head", "bias", "A", "B"])
def test_fused_linear_token_logprobs_of_a_bent_head_trains_one_tensor_alone(trained):
    tensors, ids = bent_tensors(SMALL, F32), token_ids_of(SMALL.num_tokens, 301, 1)
    call = bent(opk.fused_linear_token_logprobs)
    full = [leaf(tensor) for tensor in tensors]
    call(*full, ids, softcap=9.0).logprobs.sum().backward()
    part = [leaf(tensor) if i == trained else tensor for i, tensor in enumerate(tensors)]
    call(*part, ids, softcap=9.0).logprobs.sum().backward()
    assert torch.equal(part[trained].grad, full[trained].grad)
    assert all(tensor.grad is None for i, tensor in enumerate(part) if i != trained)


def test_fused_linear_token_logprobs_keeps_a_bent_heads_precision_under_autocast():
    tensors, ids = bent_tensors(SMALL, F32), token_ids_of(SMALL.num_tokens, 301, 1)

    def run(enabled):
        leaves = [leaf(tensor) for tensor in tensors]
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            out = bent(opk.fused_linear_token_logprobs)(*leaves, ids, softcap=9.0)
            sum(x.sum() for x in out).backward()
        return *out, *(tensor.grad for tensor in leaves)

    for one, two in zip(run(True), run(False), strict=True):
        assert torch.equal(one, two)


def test_fused_linear_token_logprobs_of_a_low_rank_pair_is_that_of_the_merged_head():
    hidden, head, _, down, up = bent_tensors(SMALL, F64)
    ids = token_ids_of(SMALL.num_tokens, 301, 1)
    out = opk.fused_linear_token_logprobs(hidden, head, ids, lora=(down, up, 0.6))
    merged = opk.fused_linear_token_logprobs(hidden, head + 0.6 * up @ down, ids)
    for one, two in zip(out, merged, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_fused_linear_token_logprobs_gradcheck_float64():
    hidden, head, ids, _ = inputs_of(FusedCase("gradcheck", 4, 9, 3, 2), F64)

    def outputs(hidden, head):
        return tuple(
            opk.fused_linear_token_logprobs(
                hidden, head, ids, temperature=1.4, workspace_bytes=3000
            )
        )

    leaves = leaf(hidden), leaf(head)
    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_fused_linear_token_logprobs_equals_token_logprobs_of_the_logits(dtype):
    hidden, head, ids, _ = inputs_of(SMALL, dtype)
    real = torch.promote_types(dtype, F32)
    fused = opk.fused_linear_token_logprobs(hidden, head, ids, temperature=0.6)
    plain = opk.token_logprobs(hidden.to(real) @ head.to(real).T, ids, temperature=0.6)
    for one, two in zip(fused, plain, strict=True):
        assert one.dtype == real
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("trained", ["hidden", "head", "none"])
def test_fused_linear_token_logprobs_gradients_of_what_is_trained_only(trained):
    hidden, head, ids, _ = inputs_of(SMALL, F32)
    full = leaf(hidden), leaf(head)
    opk.fused_linear_token_logprobs(*full, ids).logprobs.sum().backward()
    part = hidden.clone(), head.clone()
    part[0].requires_grad_(trained == "hidden")
    part[1].requires_grad_(trained == "head")
    out = opk.fused_linear_token_logprobs(*part, ids)
    assert out.logprobs.requires_grad == (trained != "none")
    if trained == "none":
        return
    out.logprobs.sum().backward()
    for tensor, reference_tensor in zip(part, full, strict=True):
        if tensor.requires_grad:
            assert torch.equal(tensor.grad, reference_tensor.grad)
        else:
            assert tensor.grad is None


def test_fused_linear_token_logprobs_masked_tokens_have_exactly_zero_gradient():
    hidden, head, ids, _ = inputs_of(SMALL, F32)
    leaves = leaf(hidden), leaf(head)
    mask = torch.arange(SMALL.num_tokens) % 3 != 0
    out = opk.fused_linear_token_logprobs(*leaves, ids)
    (out.logprobs * mask).sum().backward()
    assert bool((leaves[0].grad[~mask] == 0).all())
    subset = leaf(hidden[mask]), leaf(head)
    opk.fused_linear_token_logprobs(*subset, ids[mask]).logprobs.sum().backward()
    torch.testing.assert_close(leaves[0].grad[mask], subset[0].grad)
    torch.testing.assert_close(leaves[1].grad, subset[1].grad)


def test_fused_linear_token_logprobs_without_any_upstream_gradient():
    hidden, head, ids, _ = inputs_of(SMALL, F32)
    leaves = leaf(hidden), leaf(head)
    (opk.fused_linear_token_logprobs(*leaves, ids).logprobs * 0).sum().backward()
    assert bool((leaves[0].grad == 0).all()) and bool((leaves[1].grad == 0).all())


def test_fused_linear_token_logprobs_of_no_tokens():
    hidden = torch.empty(0, 8, requires_grad=True)
    head = torch.randn(30, 8, requires_grad=True)
    out = opk.fused_linear_token_logprobs(hidden, head, torch.empty(0, dtype=torch.int64))
    sum(x.sum() for x in out).backward()
    assert [x.shape for x in out] == [(0,)] * 3
    assert bool((head.grad == 0).all())


def test_fused_linear_token_logprobs_backward_twice():
    hidden, head, ids, _ = inputs_of(SMALL, F32)
    leaves = leaf(hidden), leaf(head)
    total = sum(x.sum() for x in opk.fused_linear_token_logprobs(*leaves, ids))
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_fused_linear_token_logprobs_keeps_its_precision_under_autocast():
    hidden, head, ids, _ = inputs_of(SMALL, F32)

    def run(enabled):
        leaves = leaf(hidden), leaf(head)
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            out = opk.fused_linear_token_logprobs(*leaves, ids)
            sum(x.sum() for x in out).backward()
        return *out, leaves[0].grad, leaves[1].grad

    for one, two in zip(run(True), run(False), strict=True):
        assert torch.equal(one, two)


def test_fused_linear_token_logprobs_stays_within_its_workspace():
    case = FusedCase("memory", 512, 4000, 64, 8)
    hidden, head, ids, _ = inputs_of(case, F32)
    leaves = leaf(hidden), leaf(head)
    budget = 1 << 20

    def step():
        opk.fused_linear_token_logprobs(
            *leaves, ids, workspace_bytes=budget
        ).logprobs.sum().backward()

    step()
    leaves[0].grad = leaves[1].grad = None
    peak = peak_bytes(step)
    gradients = hidden.nbytes + head.nbytes
    assert peak <= budget + 1.05 * gradients + (64 << 10), f"{peak} bytes"


def test_fused_linear_token_logprobs_compiles_without_a_graph_break():
    tensors, ids = bent_tensors(SMALL, F32), token_ids_of(SMALL.num_tokens, 301, 1)
    options = law_options_of("law_everything", SMALL.num_tokens)

    def loss(hidden, *rest):
        out = bent(opk.fused_linear_token_logprobs)(hidden * 1.5, *rest, ids, **options)
        return (out.logprobs - 0.1 * out.entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = ([leaf(tensor) for tensor in tensors] for _ in range(2))
    loss(*expected).backward()
    compiled(*actual).backward()
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_fused_linear_token_logprobs_opcheck(dtype):
    hidden, head, bias, down, up = bent_tensors(SMALL, dtype)
    ids = token_ids_of(SMALL.num_tokens, 301, 1)
    inputs, bias = (hidden, head, down.float(), up, ids), bias.float()
    temperatures = torch.linspace(0.5, 2, SMALL.num_tokens)
    law, end = (temperatures, [0.5, 9.0, 1.0], SMALL.vocab_size), (1 << 20,)
    ops = torch.ops.opd
    trained = [leaf(tensor) for tensor in inputs[:4]]
    torch.library.opcheck(
        ops.fused_linear_token_logprobs_fwd,
        (*trained, ids, leaf(bias), *law, None, *end, None, "cpu"),
    )
    logprobs, lse, entropy = ops.fused_linear_token_logprobs_fwd(
        *inputs, bias, *law, None, *end, None, "cpu"
    )
    grads = torch.ones_like(logprobs), torch.ones_like(lse), torch.ones_like(entropy)
    for with_grads in ([True] * 5, [True, False, True, False, True]):
        torch.library.opcheck(
            ops.fused_linear_token_logprobs_bwd,
            (*grads, *inputs, lse, entropy, bias, *law, *end, with_grads, None, "cpu"),
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 4, 8)}, ValueError, "hidden must have 2 dim.*Flatten"),
        ({"lm_head_weight": torch.zeros(8, 20)}, ValueError, r"must have shape \(vocab_size, 8\)"),
        (
            {"lm_head_weight": torch.zeros(20, 8).half()},
            TypeError,
            "lm_head_weight must have dtype",
        ),
        ({"token_ids": torch.zeros(3).long()}, ValueError, "token_ids must have 4 rows"),
        (
            {"token_ids": torch.full((4,), 20)},
            ValueError,
            r"token_ids must be in \[0, 20\), got 20",
        ),
        ({"workspace_bytes": 1}, ValueError, "workspace_bytes must be at least .* got 1"),
        ({"temperature": -2}, ValueError, "temperature must be positive and finite, got -2"),
        ({"temperature": torch.ones(5)}, ValueError, "temperature must have 4 rows"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive and finite, got -1.0"),
        ({"logit_scale": 0}, ValueError, "logit_scale must be finite and not 0, got 0"),
        (
            {"bias": torch.zeros(19)},
            ValueError,
            r"bias must have one value per token of the vocabulary \(20\), got shape \(19,\)",
        ),
        ({"bias": torch.zeros(20).long()}, TypeError, "bias must be a floating tensor"),
        ({"bias": torch.zeros(20, 1)}, ValueError, "bias must have 1 dim"),
        ({"lora": torch.zeros(2, 8)}, TypeError, r": lora must be \(A, B, scaling\)"),
        (
            {"lora": (torch.zeros(2, 8), torch.zeros(2, 20), 1.0)},
            ValueError,
            r": lora must be A \(r, 8\) and B \(20, r\) for a head \(20, 8\)",
        ),
        (
            {"lora": (torch.zeros(2, 8), torch.zeros(20, 2), 0.0)},
            ValueError,
            "scaling of lora must be finite and not 0",
        ),
        (
            {"lora": (torch.zeros(2, 8).int(), torch.zeros(20, 2), 1.0)},
            TypeError,
            "A of lora must be a floating tensor",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_fused_linear_token_logprobs_rejects_in_words(changes, error, message):
    arguments = {
        "hidden": torch.randn(4, 8),
        "lm_head_weight": torch.randn(20, 8),
        "token_ids": torch.zeros(4, dtype=torch.int64),
        **changes,
    }
    tensors = [arguments.pop(name) for name in ("hidden", "lm_head_weight", "token_ids")]
    with pytest.raises(error, match=message):
        opk.fused_linear_token_logprobs(*tensors, **arguments)
