# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from opd.objectives import FullVocab, Gold, Uld
from tests.opd.objectives.test_overlap import PAIRS
from tests.opd.objectives.test_uld import sorted_distance
from tests.opd.objectives.two_tokenizers import STUDENT, TEACHER, Case, check_hostile

# chunks that have tokens on both sides and cannot be cut further: what TRL's groups are
FINEST = ("one", "merged", "split", "other", "merged")


def merged(law, ids, span, merge):
    """The law of a group of tokens times the probability of its other tokens."""
    base = span[0] if merge == "observed" else span[-1]
    factor = 1.0
    for t in span:
        if t != base:
            factor = factor * law[t, ids[t]]
    return law[base] * factor


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum()


def without(law, ids):
    return law[[i for i in range(len(law)) if i not in ids]]


def _textbook(case, merge, hybrid=False, beta=0.5, weights=None, temperatures=(1.0, 1.0)):
    shared = [[pair[side] for pair in PAIRS] for side in (0, 1)]
    weight = len(PAIRS) / len(TEACHER)
    pair_weight, rest_weight = weights or (weight, 1 - weight)
    total = 0.0
    for _, *spans in case.spans():
        q, p = (
            merged((rows / temperature).softmax(-1), ids, span, merge)
            for rows, ids, span, temperature in zip(
                case.rows(), case.ids, spans, temperatures, strict=True
            )
        )
        if not hybrid:
            total = total + sorted_distance(q, p)
            continue
        total = total + pair_weight * jsd(p[shared[1]], q[shared[0]], beta)
        rest = without(q, shared[0]), without(p, shared[1])
        total = total + rest_weight * sorted_distance(*rest)
    return total / case.steps


@pytest.mark.parametrize("hybrid", [False, True], ids=["sorted", "hybrid"])
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_gold_is_the_textbook_sum_over_chunks(merge, hybrid):
    for bent in (False, True):
        case = Case(bent=bent)
        options = {"hybrid": hybrid} | ({"beta": 0.3} if hybrid else {})
        objective = Gold(merge=merge, temperature=1.2, teacher_temperature=0.9, **options)
        case.check(objective, _textbook(case, merge, temperatures=(1.2, 0.9), **options))


def test_given_weights_and_cross_entropy():
    case = Case()
    objective = Gold(hybrid=True, shared_weight=0.7, rest_weight=0.0, cross_entropy_weight=2.0)
    law = case.rows()[0].log_softmax(-1)
    nll = -law.gather(1, case.ids[0][:, None]).sum() / 8
    case.check(objective, _textbook(case, "observed", True, weights=(0.7, 0.0)) + 2 * nll)
    with pytest.raises(ValidationError, match="given together"):
        Gold(hybrid=True, shared_weight=0.7)
    with pytest.raises(ValidationError, match="hybrid: true"):
        Gold(shared_weight=0.7, rest_weight=0.3)


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_one_tokenizer_is_the_divergence_of_one_vocabulary(merge):
    """Hybrid: JSD_beta, D3; the other form: ULD."""
    forms = ((Gold(merge=merge, hybrid=True, beta=0.3), FullVocab(divergence="jsd", beta=0.3)),)
    forms += ((Gold(merge=merge), Uld()),)
    for objective, expected in forms:
        case = Case(num_tokens=7)
        case.parts = replace(case.parts, teacher_bytes=case.parts.student_bytes)
        found, gradients = case.run(objective, num_step_tokens=case.steps)
        case.batch = replace(case.batch, translation=None)
        again, _ = case.run(objective, num_step_tokens=case.steps)
        assert torch.equal(found.loss, again.loss)
        signal, wanted = case.run(expected, num_step_tokens=case.steps)
        torch.testing.assert_close(found.loss, signal.loss, rtol=1e-6, atol=1e-9)
        for got, exact in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hybrid", [False, True], ids=["sorted", "hybrid"])
def test_hostile_texts(hybrid):
    check_hostile(Gold(hybrid=hybrid))


def _strings(tokens):
    """Token -> lowest id, as a tokenizer's get_vocab."""
    vocab = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token.decode(), i)
    return SimpleNamespace(get_vocab=lambda: vocab)


def _as_trl(rows, ids, lengths, is_shifted):
    """Logits [1, S, V], labels, ids and byte offsets of a text behind one token of prompt.

    lengths: bytes of each token. is_shifted: a row predicts the next place, as a model's does.
    """
    pad = rows.new_zeros(1, rows.shape[1])
    logits = torch.cat([rows, pad] if is_shifted else [pad, rows])[None]
    ends = torch.tensor([0, 0, *lengths]).cumsum(0)
    offsets = torch.stack([ends[:-1], ends[1:]], -1)[None]
    ids = torch.cat([ids.new_zeros(1), ids])[None]
    return logits, ids.index_fill(1, torch.tensor([0]), -100), ids, offsets


@pytest.mark.parametrize("hybrid", [False, True], ids=["sorted", "hybrid"])
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_trl_has_the_same_loss_and_gradients(merge, hybrid):
    """TRL's `observed` is given the rows that predict the tokens: its own slices are one late."""
    trl = pytest.importorskip("trl.experimental.gold.gold_trainer")
    case = Case(FINEST)
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy=merge,
        uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.3,
    )
    loss = trl.ULDLoss(config, _strings(STUDENT), _strings(TEACHER), torch.device("cpu"))
    sides = [
        _as_trl(rows, ids, [len(table[i]) for i in ids.tolist()], merge == "bayesian")
        for rows, ids, table in zip(case.rows(), case.ids, (STUDENT, TEACHER), strict=True)
    ]
    theirs = loss(*(side[k] for k in range(3) for side in sides), *(side[3] for side in sides))
    # a mean over the groups of a text, then over texts
    case.check(
        Gold(merge=merge, hybrid=hybrid, beta=0.3),
        theirs * len(case.aligned) / case.steps,
        rtol=1e-6,
    )
