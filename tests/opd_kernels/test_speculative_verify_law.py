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
from tests.verification_laws import (
    EXACT_MODES,
    NUM_SAMPLES,
    PAIRS,
    chain_of,
    chances_of_keeping,
    check_calls,
    check_laws,
    even_work,
    of_each,
)


@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("pair", (*PAIRS, "equal"))
def test_speculative_verify_has_the_law_of_the_teacher(pair, mode):
    check_laws("cpu", pair, mode, even_work(NUM_SAMPLES))


@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("pair", (*PAIRS, "equal"))
def test_speculative_verify_of_1_to_8_sequences_is_that_of_many(pair, mode):
    check_calls("cpu", pair, mode, of_each(36))


@pytest.mark.slow
@pytest.mark.laws
@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("backend", "counts"),
    [("cpu", of_each(NUM_SAMPLES)), ("reference", even_work(NUM_SAMPLES))],
    ids=["cpu", "reference"],
)
def test_speculative_verify_of_200_000_samples_has_the_law_of_the_teacher(
    backend, counts, pair, mode, record_property
):
    check_laws(backend, pair, mode, counts, record=record_property)


@pytest.mark.slow
@pytest.mark.laws
@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("pair", PAIRS)
def test_speculative_verify_of_20_000_samples_in_calls_of_1_to_8_is_that_of_one_call(pair, mode):
    check_calls("cpu", pair, mode, even_work(20_000))


@pytest.mark.parametrize("pair", (*PAIRS, "equal"))
def test_speculative_verify_by_blocks_is_expected_to_keep_no_fewer(pair):
    rejection, block = (chances_of_keeping(chain_of(pair), mode, 8) for mode in EXACT_MODES)
    assert bool((block >= rejection - 1e-12).all())
    assert pair != "random" or bool((block > rejection)[1:].all())


def test_speculative_verify_draws_from_laws_that_are_cut():
    student, teacher = (logits[-1:] for logits in chain_of("random", 9, seed=3)[:2])
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
    law = {token: share for token, share in enumerate(cut.tolist()) if share > 0}
    assert chi_squared_p(Counter(first.tolist()), law) > 1e-3


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
    student, teacher = (logits.double() for logits in chain_of("random", 3, seed)[:2])
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
