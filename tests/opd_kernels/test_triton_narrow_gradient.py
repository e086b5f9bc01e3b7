# SPDX-License-Identifier: Apache-2.0
"""Gradients in place in 16 bits: each row's in the first half of its own float32 row."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import targets
from tests.cases import BF16, F16, token_ids_of
from tests.checks import dtype_id, laws_of

pytestmark = pytest.mark.usefixtures("interpreted_triton")
CPU, TRITON = torch.ops.opd, torch.ops.opd_triton
# opd_dtype_t
NUMBER = {BF16: 2, F16: 3}
# several tiles and a rest
TOKENS, VOCAB = 3, 2 * 2048 + 37
every_width = pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
# what the last pass of a row may be made of: dterm and q alone, the logits again, and labels
CALLS = {
    "plain": {"divergence": "jsd"},
    "softcap": {"divergence": "reverse_kl", "softcaps": (5.0, None, None)},
    "live": {
        "divergence": "forward_kl",
        "target": targets.geometric(0.3, 0.7, detach=False),
    },
    "labels": {
        "divergence": [(0.5, "jsd"), (1.0, "cross_entropy")],
        "labels": torch.tensor([[0], [VOCAB - 1], [-1]]),
    },
}
every_call = pytest.mark.parametrize("name", CALLS)


def call_of(name, weights=(1.0, 0.0, 0.3)):
    torch.manual_seed(1)
    logits = [torch.randn(TOKENS, VOCAB) * 3 for _ in range(2)]
    laws = laws_of(logits[0], VOCAB, token_weights=torch.tensor(weights), **CALLS[name])
    # of a row of weight 0 nothing is read
    for side in logits:
        side[torch.tensor(weights) == 0] = float("nan")
    return [*logits, None], laws


def narrow(logits, dtype):
    return logits.view(dtype)[:, : logits.shape[1]]


@every_width
@every_call
def test_divergence_fwd_grad_narrows_the_float32_gradient(name, dtype):
    logits, laws = call_of(name)
    wide, narrowed = ([x if x is None else x.clone() for x in logits] for _ in range(2))
    expected = TRITON.divergence_fwd_grad_(*wide, *laws, True, -1)
    actual = TRITON.divergence_fwd_grad_(*narrowed, *laws, True, NUMBER[dtype])
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one, two)
    gradient = narrow(narrowed[0], dtype)
    assert torch.equal(gradient, wide[0].to(dtype))
    assert bool((gradient[1] == 0).all()) and bool(gradient.isfinite().all())


@every_width
@every_call
def test_divergence_bwd_narrows_the_float32_gradient(name, dtype):
    logits, laws = call_of(name)
    _, state, _ = TRITON.divergence_fwd(*logits, *laws, False)
    upstream = torch.linspace(1.0, -0.5, TOKENS)
    part = slice(19, VOCAB - 5)
    wide, narrowed = (
        [None if side is None else side[:, part].clone() for side in logits] for _ in range(2)
    )
    laws = laws.columns(part)
    TRITON.divergence_bwd_(upstream, state, *wide, *laws, part.start, -1)
    TRITON.divergence_bwd_(upstream, state, *narrowed, *laws, part.start, NUMBER[dtype])
    assert torch.equal(narrow(narrowed[0], dtype), wide[0].to(dtype))
    assert bool((wide[0][0] != 0).any())


@every_width
@pytest.mark.parametrize("numbers", [[1.0, 0.0, 0.7], [-0.5, 2.0, 0.7]], ids=["plain", "capped"])
def test_token_logprobs_bwd_narrows_the_float32_gradient(numbers, dtype):
    logits, ids = torch.randn(TOKENS, VOCAB) * 3, token_ids_of(TOKENS, VOCAB, 7)
    law = (torch.randn(VOCAB), None, numbers, VOCAB)
    _, lse, entropy = TRITON.token_logprobs_fwd(logits, ids, *law)
    grads = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1.0, 0.0, 0.5]).double(), torch.zeros(3)
    wide, narrowed = logits.clone(), logits.clone()
    TRITON.token_logprobs_bwd_(*grads, wide, ids, lse, entropy, *law, -1)
    TRITON.token_logprobs_bwd_(*grads, narrowed, ids, lse, entropy, *law, NUMBER[dtype])
    gradient = narrow(narrowed, dtype)
    assert torch.equal(gradient, wide.to(dtype))
    assert bool((gradient[1] == 0).all()) and bool((gradient[0] != 0).any())


def test_narrow_gradients_in_rows_that_are_apart():
    logits, laws = call_of("plain")
    storage = [torch.full((TOKENS, VOCAB + 7), 9.0) for _ in range(2)]
    for wide, side in zip(storage, logits, strict=False):
        wide[:, :VOCAB] = side
    expected = [side.clone() for side in logits[:2]]
    TRITON.divergence_fwd_grad_(*expected, None, *laws, False, -1)
    inside = [wide[:, :VOCAB] for wide in storage]
    TRITON.divergence_fwd_grad_(*inside, None, *laws, False, NUMBER[BF16])
    assert torch.equal(narrow(inside[0], BF16), expected[0].to(BF16))
    assert bool((storage[0][:, VOCAB:] == 9.0).all())


@pytest.mark.parametrize("grad_dtype", [0, 1, 7])
def test_triton_refuses_other_gradients_in_words(grad_dtype):
    logits, laws = call_of("plain")
    with pytest.raises(RuntimeError, match=r"grad_dtype must be -1, or 2 .* with float32 logits"):
        TRITON.divergence_fwd_grad_(*logits, *laws, False, grad_dtype)


def test_cpu_refuses_narrow_gradients_in_words():
    logits, laws = call_of("plain", weights=(1.0, 1.0, 1.0))
    match = "grad_dtype must be -1 on CPU, where the GEMMs take dZ in the dtype of the logits"
    with pytest.raises(RuntimeError, match=match):
        CPU.divergence_fwd_grad_(*logits, *laws, False, 2)
    _, state, _ = CPU.divergence_fwd(*logits, *laws, False)
    with pytest.raises(RuntimeError, match=match):
        CPU.divergence_bwd_(torch.ones(TOKENS), state, *logits, *laws, 0, 2)
    ids, law = torch.zeros(TOKENS, dtype=torch.int64), (None, None, [1.0, 0.0, 1.0], VOCAB)
    _, lse, entropy = CPU.token_logprobs_fwd(logits[0], ids, *law)
    ones = torch.ones(TOKENS)
    with pytest.raises(RuntimeError, match=match):
        CPU.token_logprobs_bwd_(ones, ones.double(), ones, logits[0], ids, lse, entropy, *law, 3)


@every_width
def test_narrow_gradients_opcheck(dtype):
    logits, laws = call_of("plain", weights=(1.0, 1.0, 1.0))
    logits, number = [None if side is None else side[:, :64] for side in logits], NUMBER[dtype]
    logits = [None if side is None else side.contiguous() for side in logits]
    laws = laws._replace(vocab_size=64)
    loss, state, _ = TRITON.divergence_fwd(*logits, *laws, False)
    torch.library.opcheck(TRITON.divergence_fwd_grad_, (*logits, *laws, True, number))
    torch.library.opcheck(
        TRITON.divergence_bwd_, (torch.ones_like(loss), state, *logits, *laws, 0, number)
    )
