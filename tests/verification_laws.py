# SPDX-License-Identifier: Apache-2.0
"""What comes out of speculative_verify, sampled and held against the teacher's law.

Student and teacher are Markov chains over a few tokens. The student drafts, a backend verifies, the
teacher goes on alone to one token more than there are drafts: these texts are to be the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import opd_kernels as opk
from tests.cases import F64, INF
from tests.chi_squared import chi_squared_p_of_all
from tests.verification import Drafts, same

NUM_SAMPLES = 200_000
PAIRS = ("random", "near", "disjoint", "one_hot")
EXACT_MODES = ("rejection", "block")
NUM_DRAFTS = range(1, 9)
# of the calls in which few sequences are verified: 36 in turn
CALL_SIZES = range(1, 9)
_TURN = sum(CALL_SIZES)
_LEAST_P = 1e-3
_SEED = 100
_VOCAB_SIZE = 5


class Chain(NamedTuple):
    """Logits [V + 1, V] after each last token, and at the start, and the laws that these are."""

    student: Tensor
    teacher: Tensor
    q: Tensor
    p: Tensor


def chain_of(pair: str, vocab_size: int = _VOCAB_SIZE, seed: int = 6) -> Chain:
    """one_hot: after an odd token, and at the start of an odd V, the student has nothing but the
    teacher's best token, after an even one the teacher.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = 1.5 * torch.randn(vocab_size + 1, vocab_size, generator=generator)
    student = 1.5 * torch.randn(vocab_size + 1, vocab_size, generator=generator)
    if pair == "near":
        student = teacher + 0.03 * student
    elif pair == "disjoint":
        student[:, ::2], teacher[:, 1::2] = -INF, -INF
    elif pair == "one_hot":
        best = torch.full_like(teacher, -INF).scatter(1, teacher.argmax(1, keepdim=True), 0.0)
        teacher[::2], student[1::2] = best[::2], best[1::2]
    elif pair == "equal":
        student = teacher
    return Chain(student, teacher, student.double().softmax(1), teacher.double().softmax(1))


def even_work(num_sequences: int) -> dict[int, int]:
    """Sequences for each number of drafts: whole turns, no fewer in all, as many drafts of each."""
    harmonic = sum(1 / num_drafts for num_drafts in NUM_DRAFTS)
    share = num_sequences / harmonic
    return {n: math.ceil(share / n / _TURN) * _TURN for n in NUM_DRAFTS}


def of_each(num_sequences: int) -> dict[int, int]:
    return dict.fromkeys(NUM_DRAFTS, math.ceil(num_sequences / _TURN) * _TURN)


def _next(law: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    """[N] tokens of a chain after the tokens before."""
    upto = law[before].cumsum(1)
    uniforms = torch.rand(len(before), 1, generator=generator, dtype=F64)
    return (upto <= uniforms * upto[:, -1:]).sum(1)


def drafts_of_chain(
    chain: Chain, num_sequences: int, num_drafts: int, generator: torch.Generator
) -> Drafts:
    history = [torch.full((num_sequences,), chain.p.shape[1])]
    for _ in range(num_drafts):
        history.append(_next(chain.q, history[-1], generator))
    before = torch.stack(history, 1)
    uniforms = torch.rand(num_sequences, num_drafts + 1, generator=generator, dtype=F64)
    ids = before[:, 1:].contiguous()
    return Drafts(ids, chain.student[before[:, :-1]], chain.teacher[before], uniforms)


def verdict_of(drafts: Drafts, backend: str, mode: str, device: str = "cpu", **options):
    """On the CPU, wherever it was found."""
    ids, student, teacher, uniforms = (value.to(device) for value in drafts)
    v = opk.speculative_verify(
        ids, student, teacher, uniforms=uniforms, mode=mode, backend=backend, **options
    )
    return type(v)(*(None if value is None else value.cpu() for value in v))


def texts_of(chain: Chain, drafts: Drafts, v, generator: torch.Generator) -> Tensor:
    """[N, G + 1] tokens: what was kept, what came next, and what the teacher says after that."""
    texts, before = [], torch.full((len(drafts.ids),), chain.p.shape[1])
    for place in range(drafts.ids.shape[1] + 1):
        own = _next(chain.p, before, generator)
        after = torch.where(v.num_accepted == place, v.next_token.long(), own)
        if place < drafts.ids.shape[1]:
            after = torch.where(v.num_accepted > place, drafts.ids[:, place], after)
        texts.append(after)
        before = after
    return torch.stack(texts, 1)


class DistinctRows:
    """Row kernels that see each row with its id once: that of a chain has few, over and over.

    What they say of a row is to be no other in other company, which is for a test of its own.
    """

    def __init__(self, kernels) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str):
        return getattr(self._kernels, name)

    def speculative_verify_rows_fwd(self, logits: Tensor, ids: Tensor, *law) -> tuple[Tensor, ...]:
        rows = torch.cat([logits, ids.to(logits.dtype).unsqueeze(1)], 1)
        distinct, place = rows.unique(dim=0, return_inverse=True)
        logits, ids = distinct[:, :-1].contiguous(), distinct[:, -1].to(ids.dtype)
        values = self._kernels.speculative_verify_rows_fwd(logits, ids, *law)
        return tuple(value[place] for value in values)


# -- how many are kept -----------------------------------------------------------------------------


def chances_of_keeping(chain: Chain, mode: str, num_drafts: int) -> Tensor:
    """[G]: P(n >= i) of i = 1 .. G, where n drafts are kept.

    rejection: each is kept with probability min(1, p / q). block: P(n >= i | x) = w_i
    (arXiv:2403.10444), here its mean over all paths of the student.
    """
    q, p = chain.q, chain.p
    start, chances = p.shape[1], []
    if mode == "rejection":
        reached = torch.zeros(start + 1, dtype=F64)
        reached[start] = 1.0
        for _ in range(num_drafts):
            reached = torch.nn.functional.pad(reached @ torch.minimum(p, q), (0, 1))
            chances.append(reached.sum())
        return torch.stack(chances)
    ratio = torch.where(q > 0, p / q, 0.0)
    before = torch.tensor([start])
    drafted, weight = torch.ones(2, 1, dtype=F64)
    for _ in range(num_drafts):
        weight = (weight.unsqueeze(1) * ratio[before]).clamp(max=1.0).flatten()
        drafted = (drafted.unsqueeze(1) * q[before]).flatten()
        before = torch.arange(start).repeat(len(before))
        possible = drafted > 0
        before, drafted, weight = before[possible], drafted[possible], weight[possible]
        chances.append((drafted * weight).sum())
    return torch.stack(chances)


def _check_length(chain: Chain, pair: str, mode: str, drafts: Drafts, v) -> float:
    """The p-value of how many are kept."""
    num_sequences, num_drafts = drafts.ids.shape
    found = v.num_accepted.double()
    chances = chances_of_keeping(chain, mode, num_drafts)
    expected = float(chances.sum())
    square = float(chances @ torch.arange(1, 2 * num_drafts, 2, dtype=F64))
    error = math.sqrt(max(0.0, square - expected**2) / num_sequences)
    assert abs(float(found.mean()) - expected) <= 4 * error + 1e-9, (float(found.mean()), expected)
    if mode == "rejection" or num_drafts == 1:
        overlap = float(torch.minimum(chain.p[-1], chain.q[-1]).sum())
        error = math.sqrt(max(0.0, overlap * (1 - overlap)) / num_sequences)
        kept = float((found > 0).double().mean())
        assert abs(kept - overlap) <= 4 * error + 1e-9, (kept, overlap)
    if mode == "block":
        more = found - verdict_of(drafts, "cpu", "rejection").num_accepted
        error = float(more.std()) / math.sqrt(num_sequences)
        assert float(more.mean()) >= -4 * error, (float(more.mean()), error)
    if pair == "equal":
        assert bool((v.num_accepted == num_drafts).all())
    law = -torch.nn.functional.pad(chances, (1, 1)).diff()
    law[0] += 1.0
    # rounding of what is impossible
    law = torch.where(law < 1e-12, 0.0, law)
    return chi_squared_p_of_all([_table(v.num_accepted.bincount(minlength=num_drafts + 1), law)])


# -- which tokens come out -------------------------------------------------------------------------


def _table(counts: Tensor, law: Tensor) -> tuple[dict[int, int], dict[int, float]]:
    found = {cell: count for cell, count in enumerate(counts.flatten().tolist()) if count}
    return found, {cell: share for cell, share in enumerate(law.flatten().tolist()) if share > 0}


def tables_of(chain: Chain, texts: list[Tensor]) -> dict[str, list[tuple[dict, dict]]]:
    """Of the first tokens, of the first two together, and of each later one after that before it.

    Given the token before, the tokens that a chain has at a place are independent draws of one law.
    """
    p, size = chain.p, chain.p.shape[1]

    def pairs(place: int) -> Tensor:
        found = [text[:, place] * size + text[:, place + 1] for text in texts]
        return torch.cat(found).bincount(minlength=size * size).view(size, size)

    first = torch.cat([text[:, 0] for text in texts]).bincount(minlength=size)
    tables = {
        "first": [_table(first, p[-1])],
        "two": [_table(pairs(0), p[-1].unsqueeze(1) * p[:-1])],
        "later": [],
    }
    for place in range(1, texts[0].shape[1] - 1):
        tables["later"] += [_table(*both) for both in zip(pairs(place), p[:-1], strict=True)]
    return tables


def check_laws(
    backend: str,
    pair: str,
    mode: str,
    counts: Mapping[int, int],
    *,
    device: str = "cpu",
    record: Callable[[str, object], None] = lambda name, value: None,
) -> None:
    """chi-squared of the texts at p > 1e-3: of all together, and of each G at its Bonferroni share.

    counts: sequences for each number of drafts. The number of drafts kept has its law as well; its
    mean and the share of kept first drafts are within four standard errors. `block` keeps no fewer
    than `rejection` of the same drafts, and equal models keep all. Another backend than the CPU's
    decides as that does.
    """
    chain, texts, pooled, smallest, differing = chain_of(pair), [], [], 1.0, 0
    for num_drafts, num_sequences in counts.items():
        generator = torch.Generator().manual_seed(_SEED + num_drafts)
        drafts = drafts_of_chain(chain, num_sequences, num_drafts, generator)
        v = verdict_of(drafts, backend, mode, device)
        length = _check_length(chain, pair, mode, drafts, v)
        if backend != "cpu":
            on_cpu = verdict_of(drafts, "cpu", mode)
            unlike = (v.num_accepted != on_cpu.num_accepted) | (v.next_token != on_cpu.next_token)
            differing += int(unlike.sum())
        texts.append(texts_of(chain, drafts, v, generator))
        tables = tables_of(chain, texts[-1:])
        pooled += tables["later"]
        of_these = {name: chi_squared_p_of_all(some) for name, some in tables.items()}
        of_these["kept"] = length
        least = _LEAST_P / (len(of_these) * len(counts))
        assert min(of_these.values()) > least, (num_drafts, of_these)
        smallest = min(smallest, *of_these.values())
    of_all = tables_of(chain, [text[:, :2] for text in texts]) | {"later": pooled}
    p_values = {name: chi_squared_p_of_all(some) for name, some in of_all.items()}
    for name, p_value in p_values.items():
        record(f"p of {name}", f"{p_value:.4f}")
    record("smallest p of a number of drafts", f"{smallest:.4f}")
    record("sequences", sum(counts.values()))
    record("decided otherwise than on CPU", differing)
    assert min(p_values.values()) > _LEAST_P, p_values
    # a coin or a place may fall within the rounding of a float32 law of a border
    assert differing <= 1 + 1e-5 * sum(counts.values())


# -- how many sequences a call has -----------------------------------------------------------------


def _calls(drafts: Drafts) -> Iterator[Drafts]:
    """Of 1, 2, .. 8 sequences, and so on."""
    done = 0
    while done < len(drafts.ids):
        for size in CALL_SIZES:
            yield Drafts(*(value[done : done + size] for value in drafts))
            done += size


def check_calls(
    backend: str, pair: str, mode: str, counts: Mapping[int, int], device: str = "cpu"
) -> None:
    """Calls of exactly B = 1 .. 8 sequences give what one call of all gives, bit for bit.

    counts: sequences for each G, in whole turns. `acceptance` is sum min(p, q) at each place.
    """
    chain = chain_of(pair)
    overlaps = torch.minimum(chain.p, chain.q).sum(1)
    for num_drafts, num_sequences in counts.items():
        generator = torch.Generator().manual_seed(_SEED + num_drafts)
        drafts = drafts_of_chain(chain, num_sequences, num_drafts, generator)
        v = verdict_of(drafts, backend, mode, device, with_acceptance=True)
        few = [
            verdict_of(call, backend, mode, device, with_acceptance=True) for call in _calls(drafts)
        ]
        joined = (None if one[0] is None else torch.cat(one) for one in zip(*few, strict=True))
        same(type(v)(*joined), v, what=f"{num_drafts} drafts")
        before = torch.nn.functional.pad(drafts.ids[:, :-1], (1, 0), value=chain.p.shape[1])
        expected = torch.where(v.acceptance.isnan(), math.nan, overlaps[before])
        torch.testing.assert_close(
            v.acceptance.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True
        )
        judged = torch.arange(num_drafts) <= v.num_accepted.unsqueeze(1)
        assert torch.equal(~v.acceptance.isnan(), judged)
