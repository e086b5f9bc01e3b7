# SPDX-License-Identifier: Apache-2.0
"""What the tests of topk_logprobs on every backend share: eager torch, the comparison, rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from opd_kernels import reference
from tests import eager
from tests.tolerance import assert_within_eager

NAN, INF = float("nan"), float("inf")
NAMES = ("logprobs", "lse", "tail_logprob", "entropy", "token_logprobs")
# a relative error of the tail's mass, which is an absolute one of its logarithm
TAIL_BOUND = 1e-4


def eager_topk_logprobs(
    logits: Tensor,
    num_topk: int,
    *,
    token_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """What a careful user writes: log_softmax and topk in float32 (float64), in four reads."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    nowhere = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    scaled = eager._scaled(logits, softcap, logit_scale, temperature, nowhere, dtype, vocab_size)
    every = torch.log_softmax(scaled, dim=-1)
    logprobs, ids = every.topk(num_topk, dim=-1)
    rest = every.scatter(1, ids, -INF)
    found = {
        "logprobs": logprobs,
        "lse": scaled.logsumexp(-1),
        "tail_logprob": rest.logsumexp(-1),
        "entropy": -(every.exp() * every.masked_fill(every == -INF, 0.0)).sum(-1),
    }
    if token_ids is not None:
        table = token_ids.reshape(len(logits), -1) if token_ids.numel() else token_ids
        at_ids = every.gather(1, table.clamp(min=0).long()).masked_fill(table < 0, -INF)
        found["token_logprobs"] = at_ids.reshape(token_ids.shape)
    return found


def check_topk_logprobs(
    function: Callable, logits: Tensor, num_topk: int, what: str, **keywords
) -> None:
    """`function(logits, num_topk, ...)` against the reference and eager torch.

    The ids are the reference's where the law leaves the logits as they are. Where a cap or a
    temperature rounds them, two neighbours may change places: then only what the ids stand for.
    """
    got = function(logits, num_topk, **keywords)
    truth = reference.topk_logprobs(logits.double(), num_topk, **keywords)
    baseline = eager_topk_logprobs(logits, num_topk, **keywords)
    assert got.ids.dtype == torch.int32 and got.ids.shape == truth.ids.shape, what
    compare_values(got, truth, baseline, what)
    is_plain = isinstance(keywords.get("temperature", 1.0), float) and (
        keywords.get("temperature", 1.0) == 1.0
    )
    if is_plain and set(keywords) <= {"token_ids", "vocab_size", "temperature"}:
        assert torch.equal(got.ids, truth.ids), f"{what}: ids differ from the reference's"
    check_ids(got, what)


def compare_values(got, truth, baseline: dict[str, Tensor], what: str) -> None:
    """Every output within twice eager's error, the tail's mass within TAIL_BOUND besides."""
    for name in NAMES:
        mine, exact = getattr(got, name), getattr(truth, name)
        assert (mine is None) == (exact is None), f"{what} {name}"
        if mine is None:
            continue
        real = torch.float64 if got.logprobs.dtype == torch.float64 else torch.float32
        assert mine.dtype == real and not mine.requires_grad, f"{what} {name}"
        assert_within_eager(mine, baseline[name], exact, f"{what} {name}")
    finite = truth.tail_logprob.isfinite()
    off = (got.tail_logprob.double() - truth.tail_logprob)[finite].abs()
    assert off.numel() == 0 or off.max() <= TAIL_BOUND, f"{what}: tail off by {off.max():.2e}"


def check_ids(got, what: str) -> None:
    """Best first, each token once, and padding exactly where the log-prob is -inf."""
    for ids, logprobs in zip(got.ids.tolist(), got.logprobs.tolist(), strict=True):
        if math.isnan(logprobs[0]):
            assert set(ids) == {-1}, what
            continue
        real = [token for token in ids if token >= 0]
        assert len(set(real)) == len(real), f"{what}: a token twice"
        assert [token >= 0 for token in ids] == [value > -INF for value in logprobs], what
        assert logprobs == sorted(logprobs, reverse=True), f"{what}: not in order"


def tail_rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """[9, 3000] rows of which all but the best token have a mass from 1e-12 to 1 - 1e-3."""
    masses = [1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.999]
    generator = torch.Generator().manual_seed(3)
    rest = torch.randn(len(masses), 2999, generator=generator, dtype=torch.float64) * 0.1
    rest = rest.log_softmax(-1)
    mass = torch.tensor(masses, dtype=torch.float64).unsqueeze(1)
    best = torch.log1p(-mass).expand(-1, 1)
    return torch.cat([rest + mass.log(), best], dim=1).to(dtype)


def hostile_rows(vocab_size: int) -> dict[str, Tensor]:
    """Single rows [1, V] in float32 that are the worst for one way to select or another."""
    ascending = torch.linspace(-20, 20, vocab_size)
    few = torch.full((vocab_size,), -INF)
    few[[3, vocab_size // 2, vocab_size - 1]] = torch.tensor([1.0, -2.0, 1.0])
    steps = (torch.arange(vocab_size) % 7).float()
    signed = torch.zeros(vocab_size)
    signed[::2] = -0.0
    late = torch.full((vocab_size,), -5.0)
    late[-3:] = torch.tensor([9.0, 8.0, 9.0])
    rows = {
        "ascending": ascending,
        "descending": ascending.flip(0),
        "equal": torch.full((vocab_size,), 2.5),
        "almost_nothing": few,
        "seven_values": steps,
        "signed_zeros": signed,
        "best_at_the_end": late,
        "huge": torch.linspace(1.5e38, -1.5e38, vocab_size),
        "tiny": torch.linspace(-1e-40, 1e-40, vocab_size),
    }
    return {name: row.unsqueeze(0) for name, row in rows.items()}
