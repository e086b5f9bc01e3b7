# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.batch import Head
from opd.objectives import FullVocab, Simct
from tests.opd.objectives.test_overlap import PAIRS
from tests.opd.objectives.two_tokenizers import Case, check_hostile


def _virtual(logits, ids, span, shared, kind, is_span):
    """The row of the virtual vocabulary, as the paper writes it."""
    row = logits[span[0]][shared]
    if not is_span:
        return row
    if kind == "logit":
        entry = sum(logits[t, ids[t]] for t in span) / len(span)
    else:
        law = logits.log_softmax(-1)
        entry = sum(law[t, ids[t]] for t in span) / len(span) + logits[span[0]].logsumexp(-1)
    return torch.cat([row, entry[None]])


def _textbook(case, kind, temperature):
    total = 0.0
    for _, *spans in case.spans():
        is_span = max(map(len, spans)) > 1
        laws = [
            _virtual(
                rows / (temperature if kind == "logprob" else 1.0),
                ids,
                span,
                [pair[side] for pair in PAIRS],
                kind,
                is_span,
            )
            for side, (rows, ids, span) in enumerate(zip(case.rows(), case.ids, spans, strict=True))
        ]
        if kind == "logit":
            laws = [row / temperature for row in laws]
        q, p = (row.log_softmax(-1) for row in laws)
        total = total + (q.exp() * (q - p)).sum()
    return total / case.steps


@pytest.mark.parametrize("bent", [False, True], ids=["plain", "bent"])
@pytest.mark.parametrize("kind", ["logit", "logprob"])
def test_simct_is_the_textbook_sum_over_chunks(kind, bent):
    case = Case(bent=bent)
    case.check(Simct(span=kind, temperature=0.6), _textbook(case, kind, 0.6))


def test_only_log_probabilities_are_blind_to_a_constant_of_a_position():
    """A bias that is the same for every token moves no law, and must move no loss."""
    for kind, is_blind in (("logit", False), ("logprob", True)):
        values = []
        for shift in (0.0, 3.0):
            case = Case()
            shifted = (
                case.rows()[0].detach() + shift * torch.arange(float(len(case.ids[0])))[:, None]
            )
            size = shifted.shape[1]
            # the head is the identity: hidden states are logits
            case.leaves = [shifted.requires_grad_(), torch.eye(size, dtype=shifted.dtype)]
            case.student.head = Head(case.leaves[1])
            case.leaves[1].requires_grad_()
            values.append(case.run(Simct(span=kind))[0].loss.item())
        assert (abs(values[0] - values[1]) < 1e-6) == is_blind


@pytest.mark.parametrize("kind", ["logit", "logprob"])
def test_simct_of_one_tokenizer_is_the_reverse_kl(kind):
    case = Case(num_tokens=6)
    case.parts = replace(case.parts, teacher_bytes=case.parts.student_bytes)
    signal, gradients = case.run(Simct(span=kind, temperature=0.8))
    case.batch = replace(case.batch, translation=None)
    full, expected = case.run(
        FullVocab(divergence="reverse_kl", temperature=0.8), num_step_tokens=case.steps
    )
    torch.testing.assert_close(signal.loss, full.loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
    again, _ = case.run(Simct(span=kind, temperature=0.8), num_step_tokens=case.steps)
    torch.testing.assert_close(again.loss, full.loss, rtol=1e-11, atol=1e-12)


def test_statistics_are_per_chunk():
    case = Case()
    signal, _ = case.run(Simct())
    assert signal.statistics["span_ratio"].tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]
    mean = signal.statistics["reverse_kl_overlap"].sum() / case.steps
    torch.testing.assert_close(mean, signal.loss.detach())


@pytest.mark.parametrize("kind", ["logit", "logprob"])
def test_simct_without_anything_to_compare_is_zero(kind):
    check_hostile(Simct(span=kind))


def test_vocabularies_without_a_common_token_are_refused():
    case = Case()
    with pytest.raises(ValueError, match=r"simct compares the tokens that both .* none in common"):
        Simct().bind(replace(case.parts, teacher_bytes=[b"z%d" % i for i in range(10)]))


def test_the_cross_entropy_of_all_tokens_is_added_with_its_weight():
    case = Case()
    law = case.rows()[0].log_softmax(-1)
    nll = -law.gather(1, case.ids[0][:, None]).sum().detach() / 8
    (plain, _), (both, gradients) = (
        case.run(Simct(cross_entropy_weight=weight)) for weight in (0.0, 0.25)
    )
    torch.testing.assert_close(both.loss.detach(), plain.loss.detach() + nll / 4)
    assert both.statistics["entropy"].shape == case.ids[0].shape
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
