# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.objectives import FullVocab, Mined
from tests.opd.objectives.two_tokenizers import STUDENT, TEACHER, Case, check_hostile


def _edits(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def _nearest(token):
    if token in STUDENT:
        return STUDENT.index(token)
    return min(range(len(STUDENT)), key=lambda i: (_edits(token, STUDENT[i]), i))


def _textbook(case, ce_weight, num_topk, vocab="nearest", unmatched="label", steps=8):
    """FuseLLM's loss, token by token."""
    student, teacher = (rows.log_softmax(-1) for rows in case.rows())
    pairs = {
        rows[0]: others[0] for _, rows, others in case.spans() if len(rows) == len(others) == 1
    }
    total = torch.zeros((), dtype=torch.float64)
    for t, label in enumerate(case.ids[0].tolist()):
        target = {}
        if t in pairs:
            for i in teacher[pairs[t]].argsort(descending=True)[:num_topk].tolist():
                token = TEACHER[i]
                if vocab == "exact" and token not in STUDENT:
                    continue
                target.setdefault(_nearest(token), float(teacher[pairs[t], i].exp()))
        if not target and unmatched == "skip":
            continue
        if not target:
            target = {label: 1.0}
        mass = sum(target.values())
        for i, p in target.items():
            p = torch.tensor(p / mass, dtype=torch.float64)
            total = total + (1 - ce_weight) * p * (p.log() - student[t, i])
        total = total - ce_weight * student[t, label]
    return total / steps


@pytest.mark.parametrize("bent", [False, True], ids=["plain", "bent"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("vocab", ["nearest", "exact"])
def test_mined_is_the_textbook_sum_over_tokens(vocab, ce_weight, bent):
    case = Case(bent=bent)
    objective = Mined(ce_weight=ce_weight, teacher_top_k=6, vocab=vocab)
    case.check(objective, _textbook(case, ce_weight, 6, vocab))


def test_what_has_no_law_may_be_left_out():
    case = Case()
    objective = Mined(ce_weight=0.3, teacher_top_k=4, unmatched="skip")
    case.check(objective, _textbook(case, 0.3, 4, unmatched="skip"))
    signal, _ = case.run(objective)
    assert signal.statistics["matched_ratio"].sum() == 2


def test_without_a_pair_of_single_tokens_it_is_the_cross_entropy():
    case = Case(("split", "merged", "differ"))
    law = case.rows()[0].log_softmax(-1)
    nll = -law[torch.arange(len(case.ids[0])), case.ids[0]].sum() / 8
    case.check(Mined(ce_weight=0.25), nll)


def test_mined_of_one_tokenizer_and_all_tokens_is_the_forward_kl():
    case = Case(num_tokens=6)
    case.parts = replace(case.parts, teacher_bytes=case.parts.student_bytes)
    signal, gradients = case.run(Mined(ce_weight=0.0, teacher_top_k=64))
    case.batch = replace(case.batch, translation=None)
    full, expected = case.run(FullVocab(divergence="forward_kl"))
    torch.testing.assert_close(signal.loss, full.loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def test_mined_without_anything_to_compare_is_zero():
    check_hostile(Mined(unmatched="skip"))
