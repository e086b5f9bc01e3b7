# SPDX-License-Identifier: Apache-2.0
"""token_logprobs on a GPU backend, by the public op and the raw ops."""

from __future__ import annotations

import functools

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import (
    CASES,
    F16,
    F32,
    F64,
    INTERPRETED,
    FusedCase,
    fused_of,
    logits_of,
    token_ids_of,
)
from tests.checks import check_token_logprobs, dtype_id, leaf
from tests.options import LAW_OPTIONS, law_options_of

EVERY = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype_id(dtype)}")
    for case in CASES
    if case.name in INTERPRETED and case.weights is None and not isinstance(case.temperature, tuple)
    for dtype in case.dtypes
    if dtype != F64
]


def on(gpu):
    """The op on this backend."""
    return functools.partial(opk.token_logprobs, backend=gpu.name)


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_token_logprobs_matches_reference(gpu, case, dtype):
    logits = logits_of(case, dtype).first(1 if case.vocab_size > 10000 else 3)
    num_tokens = logits.student.shape[0]
    ids = token_ids_of(num_tokens, case.vocab_size, case.seed)
    chosen = logits.student.gather(1, ids[:, None]).squeeze(1)
    check_token_logprobs(
        on(gpu),
        eager.token_logprobs,
        reference.token_logprobs,
        [logits.student],
        torch.where(chosen.isfinite(), ids, torch.zeros_like(ids)),
        dtype,
        f"{gpu.name} {case.name} {dtype_id(dtype)}",
        temperature=logits.temperature,
        vocab_size=logits.vocab_size,
    )


@pytest.mark.parametrize("dtype", [F32, F16], ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_token_logprobs_with_options_matches_reference(gpu, option, dtype):
    logits = torch.randn(3, 701) * 4
    logits[2, 5:9] = -torch.inf
    check_token_logprobs(
        on(gpu),
        eager.token_logprobs,
        reference.token_logprobs,
        [logits.to(dtype)],
        token_ids_of(3, 690, 3),
        dtype,
        f"{gpu.name} {option} {dtype_id(dtype)}",
        vocab_size=690,
        **law_options_of(option, 3),
    )


@pytest.mark.parametrize("numbers", [[1.0, 0.0, 0.7], [-0.5, 2.0, 0.7]], ids=["plain", "capped"])
def test_token_logprobs_bwd_in_place_is_bwd(gpu, numbers):
    logits, ids = torch.randn(3, 700), token_ids_of(3, 690, 7)
    law = (torch.randn(690), None, numbers, 690)
    _, lse, entropy = gpu.ops.token_logprobs_fwd(logits, ids, *law)
    grads = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1.0, 0.0, 0.5]).double(), torch.zeros(3)
    arguments = (*grads, logits, ids, lse, entropy, *law)
    gradient = gpu.ops.token_logprobs_bwd(*arguments)
    assert bool((gradient[:, 690:] == 0).all())
    assert bool((gradient[1] == 0).all())
    gpu.ops.token_logprobs_bwd_(*arguments, -1)
    assert torch.equal(logits, gradient)


def test_token_logprobs_of_an_id_out_of_range_is_nan(gpu):
    # a GPU kernel can't raise without a sync, and must not read beyond the row
    ids = torch.tensor([-1, 20, 3])
    for softcap in (0.0, 5.0):
        law = (None, None, [-2.0, softcap, 1.0], 20)
        logprobs, *_ = gpu.ops.token_logprobs_fwd(torch.randn(3, 20), ids, *law)
        assert logprobs.isnan().tolist() == [True, True, False]


def test_token_logprobs_opcheck(gpu):
    logits, ids = torch.randn(2, 20), torch.tensor([0, 17])
    law = (torch.randn(18), torch.tensor([1.5, 0.7]), [0.5, 9.0, 1.0], 18)
    torch.library.opcheck(gpu.ops.token_logprobs_fwd, (leaf(logits), ids, *law))
    logprobs, lse, entropy = gpu.ops.token_logprobs_fwd(logits, ids, *law)
    grads = torch.ones_like(logprobs), torch.ones_like(lse), torch.ones_like(entropy)
    arguments = (*grads, logits, ids, lse, entropy, *law)
    torch.library.opcheck(gpu.ops.token_logprobs_bwd, arguments)
    torch.library.opcheck(gpu.ops.token_logprobs_bwd_, (*arguments, -1))


def test_token_logprobs_compiles_without_a_graph_break(gpu):
    z, ids = torch.randn(2, 40), torch.tensor([3, 39])

    def loss(logits):
        return on(gpu)(logits * 1.5, ids).logprobs.sum()

    torch._dynamo.reset()
    expected, actual = leaf(z), leaf(z)
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    assert torch.equal(actual.grad, expected.grad)


@pytest.mark.parametrize("dtype", [F32, F16], ids=dtype_id)
def test_fused_linear_token_logprobs_of_a_bent_head_matches_reference(gpu, dtype):
    inputs = fused_of(FusedCase(gpu.name, 5, 301, 16, 8), dtype)
    extra = [(torch.randn(shape) * 0.5).to(dtype) for shape in ((301,), (4, 16), (301, 4))]

    def bent(function, **fixed):
        def call(hidden, head, bias, down, up, ids, **keywords):
            lora = (down, up, 0.6)
            return function(hidden, head, ids, bias=bias, lora=lora, **fixed, **keywords)

        return call

    check_token_logprobs(
        bent(opk.fused_linear_token_logprobs, backend=gpu.name),
        bent(eager.fused_linear_token_logprobs),
        bent(reference.fused_linear_token_logprobs),
        [inputs.student_hidden, inputs.student_lm_head_weight, *extra],
        token_ids_of(5, 301, 2),
        dtype,
        f"{gpu.name} fused {dtype_id(dtype)}",
        **law_options_of("law_everything", 5),
    )
