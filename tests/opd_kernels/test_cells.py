# SPDX-License-Identifier: Apache-2.0
"""A sparse teacher's cells: tails from what is given, ids in any shape, what is not a law."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _cells, reference
from tests.cases import F32, F64
from tests.checks import leaf
from tests.sparse import MASSES, TAILS, logits_with_tail

INF, NAN = math.inf, math.nan


def test_log_complement_is_right_at_both_ends():
    mass = torch.tensor(MASSES, dtype=F64)
    found = _cells.log_complement(torch.log1p(-mass))
    torch.testing.assert_close(found, mass.log(), rtol=0, atol=2e-4)
    torch.testing.assert_close(_cells.log_complement(mass.log()), torch.log1p(-mass))
    ends = _cells.log_complement(torch.tensor([0.0, 1e-9, -INF, NAN], dtype=F64))
    assert ends[:3].tolist() == [-INF, -INF, 0.0] and bool(ends[3].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64])
def test_cells_allow_what_rounding_makes_of_a_law(dtype):
    law = torch.randn(50, 3, dtype=F64).log_softmax(-1).to(dtype)
    ids = torch.arange(3).repeat(50, 1)
    _, cells = _cells.teacher_cells(ids, law, None, None, 9, _cells.BUCKET, F64)
    assert not bool(cells.isnan().any())
    with pytest.raises(ValueError, match="must be log-probabilities"):
        _cells.teacher_cells(ids, law + 0.2, None, None, 9, _cells.BUCKET, F64)


def test_cells_of_logits_are_nan_where_values_are_not_checked(monkeypatch):
    # on a GPU nothing waits for the sum; it does not pass for a law either
    monkeypatch.setattr(_cells, "_check_mass", lambda *_: None)
    ids, logits = torch.arange(3).repeat(2, 1), torch.tensor([[3.0, 1.0, 7.0], [-1.0, -2.0, -3.0]])
    arguments = (None, None, 9, _cells.BUCKET, F32)
    _, cells = _cells.teacher_cells(ids, logits, *arguments)
    assert bool(cells[0, :3].isnan().all()) and bool(cells[1].isfinite().all())
    loss = opk.topk_divergence(torch.randn(2, 9), ids, logits)
    assert loss.isnan().tolist() == [True, False]


def test_cells_of_a_tail_that_belongs_to_fewer_columns_are_refused():
    # the tail of the top 2, and a third column that took from it
    law = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=F64).log()
    ids, tail = torch.arange(3).unsqueeze(0), torch.tensor([0.3], dtype=F64).log()
    arguments = (None, 4, _cells.BUCKET, F64)
    _cells.teacher_cells(ids[:, :2], law[:, :2], tail, *arguments)
    with pytest.raises(ValueError, match=r"a tail that sum to 1\.2 at position 0"):
        _cells.teacher_cells(ids, law[:, :3], tail, *arguments)
    # a column without a new id takes nothing
    ids[0, 2] = 0
    _cells.teacher_cells(ids, law[:, :3], tail, *arguments)


def test_topk_divergence_computes_the_tail_where_the_numbers_allow():
    for mass in MASSES:
        teacher = logits_with_tail(mass, 300, 12, F64).log_softmax(-1)
        ids = torch.arange(12).unsqueeze(0)
        _, cells = _cells.teacher_cells(ids, teacher[:, :12], None, None, 300, _cells.BUCKET, F64)
        # 1e-16 is what float64 probabilities are rounded to
        assert cells[0, -1].exp().item() == pytest.approx(mass, abs=4e-16, rel=1e-6)


def test_topk_divergence_of_a_teacher_with_all_its_mass_on_the_ids():
    z = torch.randn(1, 9, dtype=F64)
    ids, logprobs = torch.tensor([[4, 7]]), torch.tensor([[0.25, 0.75]]).log()
    nothing = torch.tensor([-INF])
    loss = opk.topk_divergence(z, ids, logprobs, tail_logprob=nothing)
    law = z.log_softmax(-1)
    expected = 0.25 * (math.log(0.25) - law[0, 4]) + 0.75 * (math.log(0.75) - law[0, 7])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    assert opk.topk_divergence(z, ids, logprobs, tail="renormalize_teacher").item() == (
        pytest.approx(expected.item(), rel=1e-7)
    )
    # the teacher forbids the rest
    loss = opk.topk_divergence(z, ids, logprobs, tail_logprob=nothing, divergence="reverse_kl")
    assert loss.item() == INF
    one = opk.topk_divergence(z, ids[:, :1], torch.zeros(1, 1), tail_logprob=nothing)
    assert one.item() == pytest.approx(-law[0, 4].item(), rel=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys", "neyman_chi2", "forward_kl"])
def test_topk_divergence_of_log_probs_that_round_to_a_sum_of_1(divergence):
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(64, 1000, generator=generator)
    teacher = torch.randn(64, 1000, generator=generator)
    teacher[:, 0] += 40
    found = teacher.log_softmax(-1).topk(8)
    assert bool((found.values.double().exp().sum(1) >= 1).any())
    loss = opk.topk_divergence(student, found.indices, found.values, divergence=divergence)
    assert bool(loss.isfinite().all())
    truth = reference.topk_divergence(student, found.indices, found.values, divergence=divergence)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_topk_divergence_ids_in_any_order_with_repeats_and_gaps(tail):
    generator = torch.Generator().manual_seed(9)
    z = torch.randn(3, 40, generator=generator)
    logprobs, ids = torch.randn(3, 40, generator=generator).log_softmax(-1).topk(6)
    gap, lost = torch.full((3, 1), -1), torch.full((3, 1), -INF)
    # a repeat with another number: the first counts
    messy_ids = torch.cat([gap, ids[:, 3:], gap, ids[:, :3], ids[:, :2]], 1)
    messy = torch.cat([lost, logprobs[:, 3:], lost, logprobs[:, :3], lost - 3, lost + 1], 1)
    results = []
    for table, values in ((ids, logprobs), (messy_ids.int(), messy)):
        student = leaf(z)
        loss = opk.topk_divergence(student, table, values, tail=tail)
        loss.sum().backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=2e-7)


def test_topk_divergence_takes_a_column_beyond_the_top_k():
    # vLLM: the K best and the token itself, which may be one of them
    z = torch.randn(2, 40, dtype=F64)
    law = torch.randn(2, 40, dtype=F64).log_softmax(-1)
    ids = law.topk(5).indices
    for extra in (ids[:, :1], torch.tensor([[39], [38]])):
        table = torch.cat([ids, extra], 1)
        loss = opk.topk_divergence(z, table, law.gather(1, table))
        distinct = torch.stack(
            [torch.cat([row.unique(), row.new_full((6,), -1)])[:6] for row in table]
        )
        values = law.gather(1, distinct.clamp_min(0)).masked_fill(distinct < 0, -INF)
        torch.testing.assert_close(loss, opk.topk_divergence(z, distinct, values))


def test_topk_divergence_of_a_forbidden_id_is_a_cell_without_mass():
    z = torch.randn(1, 9, dtype=F64)
    ids = torch.tensor([[2, 5]])
    logprobs = torch.tensor([[0.4, 0.0]], dtype=F64).log()
    loss = opk.topk_divergence(z, ids, logprobs, divergence="reverse_kl")
    assert loss.item() == INF
    jsd = opk.topk_divergence(z, ids, logprobs, divergence="jsd")
    folded = opk.topk_divergence(z, ids[:, :1], logprobs[:, :1], divergence="jsd")
    assert jsd.item() > folded.item()


def test_topk_support():
    student = torch.tensor([[3, 1, -1], [5, 5, 2]])
    teacher = torch.tensor([[1, 7], [-5, 2]], dtype=torch.int32)
    union = opk.topk_support(student, teacher, "union")
    assert union.tolist() == [[3, 1, -1, -1, 7], [5, -1, 2, -1, -1]]
    assert opk.topk_support(student, None, "student").tolist() == [[3, 1, -1], [5, -1, 2]]
    assert opk.topk_support(None, teacher, "teacher").tolist() == [[1, 7], [-1, 2]]
    assert union.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, None, "union"), ValueError, "student_ids must be given for support 'union'"),
        ((None, None, "given"), ValueError, "support must be one of 'teacher', 'student', 'union'"),
        ((torch.zeros(2, 1), None, "student"), TypeError, "must be int64 or int32"),
        (
            (torch.zeros(2, 1).long(), torch.zeros(3, 1).long(), "union"),
            ValueError,
            "teacher_ids must have 2 rows",
        ),
    ],
    ids=["missing", "given", "float", "rows"],
)
def test_topk_support_rejects_in_words(arguments, error, message):
    with pytest.raises(error, match=message):
        opk.topk_support(*arguments)


def test_topk_divergence_of_a_lost_teacher_row_is_nan():
    # what topk_logprobs returns for a row with a NaN logit: no ids, NaN values
    z, ids = torch.randn(2, 9), torch.tensor([[1, 2], [-1, -1]])
    logprobs = torch.tensor([[-1.0, -2.0], [NAN, NAN]])
    assert opk.topk_divergence(z, ids, logprobs).isnan().tolist() == [False, True]


def test_topk_divergence_of_a_row_without_ids():
    z, ids, none = torch.randn(2, 9), torch.full((2, 3), -1), torch.full((2, 3), -INF)
    student = leaf(z)
    loss = opk.topk_divergence(student, ids, none)
    loss.sum().backward()
    # everything is in the one bucket, on both sides
    assert loss.tolist() == [0.0, 0.0] and bool((student.grad == 0).all())
    assert opk.topk_divergence(z, ids, none, tail="drop").tolist() == [0.0, 0.0]
    for tail in ("renormalize_both", "renormalize_teacher"):
        with pytest.raises(ValueError, match="must name a token of some probability"):
            opk.topk_divergence(z, ids, none, tail=tail)
        weights = torch.zeros(2)
        assert opk.topk_divergence(z, ids, none, tail=tail, token_weights=weights).sum() == 0
