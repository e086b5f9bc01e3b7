# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from opd.objectives import FullVocab, Overlap, Parts
from tests.opd.objectives.two_tokenizers import STUDENT, TEACHER, Case, check_hostile

# a, ab, b, c: the lower of the student's two ids of `c`
PAIRS = [(STUDENT.index(token), TEACHER.index(token)) for token in (b"a", b"b", b"ab", b"c")]


def _cells(logits, ids, tail):
    law = logits.softmax(-1)
    shared = law[ids]
    if tail == "renormalize_both":
        return shared / shared.sum()
    return torch.cat([shared, (1 - shared.sum())[None]])


@pytest.mark.parametrize("bent", [False, True], ids=["plain", "bent"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_overlap_is_the_textbook_sum_over_chunks(tail, bent):
    case = Case(bent=bent)
    student, teacher = case.rows()
    total = 0.0
    for _, rows, teacher_rows in case.spans():
        q = _cells(student[rows[0]] / 1.3, [pair[0] for pair in PAIRS], tail)
        p = _cells(teacher[teacher_rows[0]] / 1.3, [pair[1] for pair in PAIRS], tail)
        total = total + (q * (q / p).log()).sum()
    case.check(Overlap(tail=tail, temperature=1.3), total / case.steps)


def test_overlap_of_one_tokenizer_is_full_vocab():
    case = Case(num_tokens=7)
    for parts in (case.parts, replace(case.parts, student_bytes=None, teacher_bytes=None)):
        case.parts = parts
        case.batch = replace(case.batch, translation=replace(case.translation, num_step_chunks=9))
        signal, gradients = case.run(Overlap(divergence="jsd", params={"beta": 0.3}))
        case.batch = replace(case.batch, translation=None)
        full, expected = case.run(FullVocab(divergence="jsd", beta=0.3), num_step_tokens=9)
        again, _ = case.run(Overlap(divergence="jsd", params={"beta": 0.3}), num_step_tokens=9)
        for one in (signal, again):
            torch.testing.assert_close(one.loss, full.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-12)


def test_statistics_are_per_chunk():
    case = Case()
    signal, _ = case.run(Overlap())
    assert signal.statistics.keys() == {
        *("forward_kl_overlap", "reverse_kl_overlap", "top1_agreement_overlap"),
        *("student_mass", "teacher_mass"),
    }
    for values in signal.statistics.values():
        assert values.shape == (len(case.aligned),) and not values.requires_grad
    mean = signal.statistics["reverse_kl_overlap"].sum() / case.steps
    torch.testing.assert_close(mean, signal.loss.detach())


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_overlap_without_anything_to_compare_is_zero(tail):
    check_hostile(Overlap(tail=tail))


def test_overlap_refuses_what_compares_no_laws():
    with pytest.raises(ValidationError, match="cross_entropy has no teacher"):
        Overlap(divergence="cross_entropy")


def test_what_the_op_refuses_is_refused_before_anything_is_loaded():
    with pytest.raises(ValidationError, match="renormalize_teacher"):
        Overlap(tail="renormalize_teacher", divergence="reverse_kl")
    assert Overlap(tail="renormalize_teacher", divergence="forward_kl").tail


def test_vocabularies_are_those_of_the_run():
    case = Case()
    unbound = Overlap()
    unbound.bind(case.parts)
    case.parts = Parts(
        student=None, teacher=None, student_bytes=[b"a"] * 8, teacher_bytes=[b"z"] * 10
    )
    with pytest.raises(ValueError, match=r"overlap compares .* none in common \(8 and 10 tokens"):
        unbound.bind(case.parts)


def test_the_cross_entropy_of_all_tokens_is_added_with_its_weight():
    case = Case()
    law = case.rows()[0].log_softmax(-1)
    nll = -law.gather(1, case.ids[0][:, None]).sum().detach() / 8
    (plain, _), (both, gradients) = (
        case.run(Overlap(cross_entropy_weight=weight)) for weight in (0.0, 0.25)
    )
    torch.testing.assert_close(both.loss.detach(), plain.loss.detach() + nll / 4)
    assert both.statistics["entropy"].shape == case.ids[0].shape
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
