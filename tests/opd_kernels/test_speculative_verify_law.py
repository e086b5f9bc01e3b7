# SPDX-License-Identifier: Apache-2.0
"""What comes out of opk.speculative_verify has the teacher's law, on CPU and by the reference."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from tests.cases import F64, INF
from tests.chi_squared import chi_squared_p

NUM_SAMPLES = 200_000
PAIRS = ("random", "near", "disjoint", "one_hot")
MODES = ("rejection", "block")


def chain_of(pair: str, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [V + 1, V] of a student and a teacher after each last token, and at the start."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 1.5 * torch.randn(vocab_size + 1, vocab_size, generator=generator)
    student = 1.5 * torch.randn(vocab_size + 1, vocab_size, generator=generator)
    if pair == "near":
        student = teacher + 0.03 * student
    elif pair == "disjoint":
        student[:, ::2], teacher[:, 1::2] = -INF, -INF
    elif pair == "one_hot":
        best = teacher.argmax(1, keepdim=True)
        teacher = torch.full_like(teacher, -INF).scatter(1, best, 0.0)
    return student, teacher


def steps(law: Tensor, before: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[N, count] tokens of a chain after the tokens before."""
    tokens = []
    for _ in range(count):
        upto = law[before].cumsum(1)
        uniforms = torch.rand(len(before), 1, generator=generator, dtype=F64)
        before = (upto <= uniforms * upto[:, -1:]).sum(1)
        tokens.append(before)
    return torch.stack(tokens, 1)


def verified(pair, mode, num_drafts, vocab_size, backend, seed=1):
    """The verdict on NUM_SAMPLES drafts, and the first two tokens that come of each."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = chain_of(pair, vocab_size)
    q, p = student.double().softmax(1), teacher.double().softmax(1)
    start = torch.full((NUM_SAMPLES,), vocab_size)
    drafts = steps(q, start, num_drafts, generator)
    history = torch.cat([start.unsqueeze(1), drafts], 1)
    uniforms = torch.rand(NUM_SAMPLES, num_drafts + 1, generator=generator, dtype=F64)
    v = opk.speculative_verify(
        drafts,
        student[history[:, :-1]],
        teacher[history],
        uniforms=uniforms,
        mode=mode,
        with_acceptance=True,
        backend=backend,
    )
    tokens = torch.nn.functional.pad(drafts, (0, 2))
    place = v.num_accepted.long().unsqueeze(1)
    tokens = tokens.scatter(1, place, v.next_token.long().unsqueeze(1))
    # where the first token is the last that came, the teacher goes on
    more = steps(p, v.next_token.long(), 1, generator)
    second = torch.where(v.num_accepted == 0, more[:, 0], tokens[:, 1])
    return v, torch.stack([tokens[:, 0], second], 1), p, q


def p_value(found: Tensor, law: Tensor) -> float:
    """Of tokens [N, n] under a law [V, .., V]."""
    cells = found[:, 0]
    for place, size in enumerate(law.shape[1:], 1):
        cells = cells * size + found[:, place]
    numbers = cells.bincount(minlength=law.numel()).tolist()
    counts = {cell: number for cell, number in enumerate(numbers) if number}
    possible = {cell: share for cell, share in enumerate(law.flatten().tolist()) if share > 0}
    if len(possible) == 1:
        return float(counts.keys() == possible.keys())
    return chi_squared_p(counts, possible)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", PAIRS)
def test_speculative_verify_has_the_law_of_the_teacher(pair, backend):
    means = {}
    for mode, num_drafts in itertools.product(MODES, (1, 3)):
        v, tokens, p, q = verified(pair, mode, num_drafts, 4, backend)
        assert p_value(tokens[:, :1], p[-1]) > 1e-3, (mode, num_drafts)
        assert p_value(tokens, p[-1].unsqueeze(1) * p[:-1]) > 1e-3, (mode, num_drafts)
        overlap = torch.minimum(p[-1], q[-1]).sum()
        kept = (v.num_accepted > 0).double().mean()
        error = math.sqrt(max(0.0, float(overlap * (1 - overlap))) / NUM_SAMPLES)
        if mode == "rejection" or num_drafts == 1:
            assert abs(float(kept - overlap)) <= 4 * error + 1e-9, (mode, kept, overlap)
        torch.testing.assert_close(
            v.acceptance[:, 0].double(), overlap.expand(NUM_SAMPLES), rtol=1e-5, atol=1e-6
        )
        means[mode, num_drafts] = v.num_accepted.double().mean(), v.num_accepted.double().std()
    (block, spread), (rejection, _) = means["block", 3], means["rejection", 3]
    assert block >= rejection - 4 * spread / math.sqrt(NUM_SAMPLES)
    if pair == "random":
        assert block > rejection + 4 * spread / math.sqrt(NUM_SAMPLES)


@pytest.mark.parametrize("num_drafts", [2, 8])
@pytest.mark.parametrize("mode", MODES)
def test_speculative_verify_has_the_law_of_the_teacher_for_long_drafts(mode, num_drafts):
    _, tokens, p, _ = verified("near", mode, num_drafts, 6, "cpu", seed=2)
    assert p_value(tokens, p[-1].unsqueeze(1) * p[:-1]) > 1e-3


def test_speculative_verify_draws_from_laws_that_are_cut():
    student, teacher = (logits[-1:] for logits in chain_of("random", 9, seed=3))
    cut = torch.where(teacher >= teacher.sort().values[:, -4], teacher, -INF).softmax(1)[0]
    generator = torch.Generator().manual_seed(4)
    drafts = torch.multinomial(student[0].softmax(0), NUM_SAMPLES, True, generator=generator)
    v = opk.speculative_verify(
        drafts.unsqueeze(1),
        student.expand(NUM_SAMPLES, 1, 9),
        teacher.expand(NUM_SAMPLES, 2, 9),
        uniforms=torch.rand(NUM_SAMPLES, 2, generator=generator, dtype=F64),
        top_k=4,
        student_top_k=0,
    )
    first = torch.where(v.num_accepted == 0, v.next_token.long(), drafts)
    assert p_value(first.unsqueeze(1), cut) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_speculative_verify_of_equal_models_keeps_every_draft(mode):
    _, teacher = chain_of("random", 5)
    logits = teacher[-1].expand(10_000, 9, 5)
    drafts = torch.randint(5, (10_000, 8), generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(10_000, 9, dtype=F64)
    v = opk.speculative_verify(drafts, logits[:, :8], logits, uniforms=uniforms, mode=mode)
    assert bool((v.num_accepted == 8).all())


# -- block verification, path by path ------------------------------------------------------------


def chances(path: tuple[int, ...], p: Tensor, q: Tensor) -> tuple[list[float], list[float]]:
    """(w_0 .. w_G, h_1 .. h_G) of drafts of a chain, by Algorithm 2 of the paper."""
    start = len(p) - 1
    before = (start, *path)
    weights, found = [1.0], []
    for i, token in enumerate(path):
        ratio = float(p[before[i], token] / q[before[i], token])
        weights.append(min(1.0, weights[-1] * ratio))
        mass = float((weights[-1] * p[token] - q[token]).clamp(min=0).sum())
        inside = mass / (mass + 1 - weights[-1]) if mass > 0 else 0.0
        found.append(inside if i + 1 < len(path) else weights[-1])
    return weights, found


@pytest.mark.parametrize("seed", [0, 1])
def test_speculative_verify_by_blocks_is_the_algorithm_for_every_path(seed):
    student, teacher = (logits.double() for logits in chain_of("random", 3, seed))
    p, q = teacher.softmax(1), student.softmax(1)
    paths = list(itertools.product(range(3), repeat=3))
    law: Counter = Counter()
    for path in paths:
        before = (3, *path)
        weights, found = chances(path, p, q)
        drafted = math.prod(float(q[before[i], token]) for i, token in enumerate(path))
        for kept in range(4):
            chance = found[kept - 1] if kept else 1.0
            chance *= math.prod(1 - later for later in found[kept:])
            last = p[before[kept]]
            if kept < 3:
                last = (weights[kept] * last - q[before[kept]]).clamp(min=0)
            for token, share in enumerate(last / last.sum()):
                if chance * drafted == 0:
                    continue
                out = (*path[:kept], token)
                # the teacher goes on to three tokens
                for rest in itertools.product(range(3), repeat=max(0, 3 - len(out))):
                    whole = (*out, *rest)
                    tail = [float(p[whole[i - 1], whole[i]]) for i in range(len(out), len(whole))]
                    law[whole[:3]] += drafted * chance * float(share) * math.prod(tail)
        for kept, chance in enumerate(found, 1):
            for side in (-1e-9, 1e-9):
                # every other coin refuses
                uniforms = torch.full((1, 4), 1 - 2.0**-53, dtype=F64)
                uniforms[0, kept - 1] = min(max(chance + side, 0.0), 1 - 2.0**-53)
                if not 1e-6 < chance < 1 - 1e-6 or any(other >= 1 - 1e-6 for other in found):
                    continue
                v = opk.speculative_verify(
                    torch.tensor([path]),
                    student[list(before[:3])].unsqueeze(0),
                    teacher[list(before)].unsqueeze(0),
                    uniforms=uniforms,
                    mode="block",
                )
                assert int(v.num_accepted) == (kept if side < 0 else 0), (path, kept, found)
    for path in paths:
        before = (3, *path)
        expected = math.prod(float(p[before[i], token]) for i, token in enumerate(path))
        assert law[path] == pytest.approx(expected, abs=1e-12)
