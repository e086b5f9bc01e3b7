# SPDX-License-Identifier: Apache-2.0
"""Texts, a tiny teacher, and clients of fake servers of it."""

from __future__ import annotations

import pytest
import torch

from opd.clients import connect
from tests.opd.clients import fakes

FAKES = {"vllm": fakes.FakeVllm, "sglang": fakes.FakeSglang, "trl": fakes.FakeTrl}
VOCAB_SIZE = 45
# (tokens, prompt tokens): a completion of 1 token, an empty one, one of nearly all
LENGTHS = ((9, 4), (20, 19), (7, 7), (14, 1), (11, 6))


@pytest.fixture
def sequences():
    """Ragged texts."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator) for length, _ in LENGTHS]


@pytest.fixture
def starts():
    """Their prompts' lengths."""
    return [start for _, start in LENGTHS]


@pytest.fixture
def laws(teacher, sequences, starts):
    """[C, V] log-probs of each text's completion, by the model itself."""
    with torch.no_grad():
        return [
            teacher.model(ids[None]).logits[0, start - 1 : len(ids) - 1].float().log_softmax(-1)
            for ids, start in zip(sequences, starts, strict=True)
        ]


@pytest.fixture
def fake(teacher):
    """A factory of (client, fake server)."""
    made = []

    def build(kind, *, vocab_size=VOCAB_SIZE, client=None, **settings):
        server = FAKES[kind](teacher.model, **settings)
        made.append(
            connect(
                kind,
                "http://teacher:1",
                vocab_size=vocab_size,
                transport=server.transport(),
                **{"deadline_s": 5.0, **(client or {})},
            )
        )
        return made[-1], server

    yield build
    for client in made:
        client.close()
