# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from opd.clients import connect
from opd.clients.probe import ProbeFailed, probe
from tests.opd.clients.conftest import VOCAB_SIZE
from tests.opd.clients.test_kinds import VARIANTS


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join([v[0], *map(str, v[1].values())]))
def variant(request):
    return request.param


def test_a_server_of_the_same_weights_passes(fake, variant, teacher):
    client, _ = fake(variant[0], client=variant[1])
    report = probe(client, teacher, vocab_size=VOCAB_SIZE)
    assert report.max_error < 1e-4
    assert any("rows:" in line for line in report.checked)
    assert any("temperature:" in line for line in report.skipped)


def test_our_own_server_passes_with_its_temperature(live, engine, teacher):
    client = connect("opd", live(engine), vocab_size=VOCAB_SIZE)
    report = probe(client, teacher, vocab_size=VOCAB_SIZE)
    assert [line.split(":")[0] for line in report.checked] == ["rows", "temperature", "numbers"]
    assert report.max_error < 1e-4 and not report.skipped
    assert probe(client, vocab_size=VOCAB_SIZE).max_error is None


class Shifted:
    """A client whose rows are those of the next or of the former token."""

    def __init__(self, client, shift):
        self._client = client
        self._shift = shift

    def info(self):
        return self._client.info()

    def score(self, sequences, starts, **options):
        import dataclasses

        texts = []
        for ids in sequences:
            # the row of a token behind the end is there too, for shift 1
            texts.append(torch.cat([ids, ids[:1]]) if self._shift == 1 else ids)
        found = self._client.score(texts, starts, **options)
        moved = []
        for scores, ids, start in zip(found, sequences, starts, strict=True):
            if self._shift == 1:
                rows = slice(1, None)
                values = {n: getattr(scores, n)[rows] for n in ("ids", "logprobs")}
            else:
                values = {
                    n: torch.cat([getattr(scores, n)[:1], getattr(scores, n)[:-1]])
                    for n in ("ids", "logprobs")
                }
            moved.append(dataclasses.replace(scores, token_ids=ids[start:].int(), **values))
        return moved


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("with_weights", [True, False])
def test_shifted_rows_are_named_even_without_the_weights(fake, teacher, shift, with_weights):
    client, _ = fake("vllm")
    local = teacher if with_weights else None
    with pytest.raises(ProbeFailed, match="shifted by one"):
        probe(Shifted(client, shift), local, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("shift", [1, -1])
def test_the_comparison_of_numbers_names_a_shift_too(fake, teacher, shift, monkeypatch):
    client, _ = fake("vllm")
    monkeypatch.setattr("opd.clients.probe._check_rows", lambda *arguments: "")
    with pytest.raises(ProbeFailed, match="shifted by one"):
        probe(Shifted(client, shift), teacher, vocab_size=VOCAB_SIZE)


def test_another_temperature_is_named(fake, teacher):
    client, _ = fake("vllm", temperature=0.7)
    with pytest.raises(ProbeFailed, match=r"those of temperature 0.7"):
        probe(client, teacher, vocab_size=VOCAB_SIZE)


def test_other_weights_are_not_explained_away(fake, student):
    client, _ = fake("vllm")
    with pytest.raises(ProbeFailed, match="same checkpoint"):
        probe(client, student, vocab_size=VOCAB_SIZE)


def test_a_temperature_that_is_not_applied(live, engine, teacher):
    client = connect("opd", live(engine), vocab_size=VOCAB_SIZE)
    score = client.score
    client.score = lambda *a, temperature=1.0, **k: score(*a, **k)
    with pytest.raises(ProbeFailed, match="asked for 2, its log-probabilities are those of 1"):
        probe(client, teacher, vocab_size=VOCAB_SIZE)


def test_constant_replies(fake):
    client, server = fake("vllm")
    ids = list(range(10, 22))
    reply = server.prompt_logprobs(ids, 8)

    def same(ids_, k):
        rows = [None]
        for row, token in zip(reply[1:], ids_[1:], strict=True):
            rows.append({str(token): {"logprob": -9.0}} | row)
        return rows

    server.prompt_logprobs = same
    with pytest.raises(Exception, match=r"shifted by one|every reply|entries"):
        probe(client, vocab_size=VOCAB_SIZE, sequence=ids)


def test_short_texts_are_refused(fake):
    client, _ = fake("vllm")
    with pytest.raises(ValueError, match="at least 6 tokens"):
        probe(client, vocab_size=VOCAB_SIZE, sequence=[1, 2])
