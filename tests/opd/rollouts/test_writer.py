# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import pytest
import torch

import opd_kernels as opk
from opd.rollouts.writer import Writer, draw, judge, make_writer, refuse_broken
from tests.chi_squared import chi_squared_p

LAW = {"temperature": 0.7, "top_k": 9, "top_p": 0.8}


def _law(model, hidden, *, temperature=1.0, top_k=0, top_p=1.0):
    logits = model.head.logits(hidden).double() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    ordered, order = logits.softmax(-1).sort(descending=True)
    drop = ordered.cumsum(-1) - ordered >= top_p
    drop = torch.zeros_like(drop).scatter(-1, order, drop)
    return logits.masked_fill(drop, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("law", [{}, LAW], ids=["whole", "cut"])
def test_draws_have_the_law_and_its_logprobs(student, law):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(16, generator=generator).expand(4000, -1)
    uniforms = torch.rand(4000, generator=generator, dtype=torch.float64)
    ids, logprobs = draw(Writer(model=student, **law), hidden, uniforms)
    assert ids.dtype == torch.int64
    expected = _law(student, hidden[:1], **law)[0].detach()
    torch.testing.assert_close(logprobs.double(), expected[ids], rtol=1e-5, atol=1e-6)
    kept = {i: float(p) for i, p in enumerate(expected.exp()) if p > 0}
    assert len(kept) == 45 if not law else len(kept) < 9
    assert chi_squared_p(Counter(ids.tolist()), kept) > 1e-3


def test_a_greedy_draw_is_the_likeliest(student):
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    ids, _ = draw(Writer(model=student), hidden, None, is_greedy=True)
    assert torch.equal(ids, student.head.logits(hidden).argmax(-1))


@pytest.fixture
def head_rows(monkeypatch):
    """How many rows of a head each call of the kernel asks for."""
    counts, kernel = [], opk.fused_linear_speculative_verify

    def counting(drafts, student_hidden, student_head, teacher_hidden, *args, **options):
        of_student = 0 if student_hidden is None else student_hidden[..., 0].numel()
        counts.append(of_student + teacher_hidden[..., 0].numel())
        return kernel(drafts, student_hidden, student_head, teacher_hidden, *args, **options)

    monkeypatch.setattr(opk, "fused_linear_speculative_verify", counting)
    return counts


# one, a row, and several whose last has room to spare
@pytest.mark.parametrize("count", [1, 32, 100])
@pytest.mark.parametrize("law", [{"temperature": 1.3}, LAW], ids=["whole", "cut"])
def test_a_model_is_asked_about_any_token(student, head_rows, law, count):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, 16, generator=generator)
    ids = torch.arange(count) % 45
    told = judge(Writer(model=student, **law), hidden, ids)
    expected = _law(student, hidden, **law).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(told.double(), expected, rtol=1e-5, atol=1e-5)
    # also about those that a law never draws
    assert bool(torch.isinf(told[1:]).any()) == (law == LAW and count > 1)
    assert sum(head_rows) <= count * 1.05 + 1


def test_a_law_that_is_none_has_no_token(student):
    hidden = torch.ones(2, 16)
    hidden[1, 0] = torch.nan
    ids, _ = draw(Writer(model=student), hidden, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert ids[0] >= 0
    assert ids[1] == -1
    with pytest.raises(FloatingPointError, match="student: its logits are not finite"):
        refuse_broken(True, Writer(model=student))
    refuse_broken(False, Writer(model=student))


def test_a_writer_knows_whether_its_cache_can_forget(family_model):
    from opd.model import LanguageModel

    assert make_writer(LanguageModel(family_model("llama", seed=1))).keeps_cache
    model = LanguageModel(family_model("mamba", seed=1, state_size=4))
    assert not make_writer(model).keeps_cache
