# SPDX-License-Identifier: Apache-2.0
"""Small stores of laws that a number decides."""

from __future__ import annotations

import pytest
import torch

from opd.store import TeacherFingerprint, TeacherStore

VOCAB, TOPK = 1000, 8

FINGERPRINT = TeacherFingerprint(
    model="some/teacher",
    config_hash="11",
    weights_hash="22",
    tokenizer_hash="33",
    temperature=1.0,
)


def create(path, **changes):
    """A store of FINGERPRINT."""
    settings = {"fingerprint": FINGERPRINT, "vocab_size": VOCAB, "num_topk": TOPK, "bits": 8}
    return TeacherStore.create(path, **{**settings, **changes})


def ids_of(number):
    """Prompt and completion of record `number`; some of both are empty."""
    prompt = torch.arange(number % 5) if number % 7 else torch.tensor([number])
    return prompt, torch.full((number % 7,), number)


def laws_of(number):
    """ids, logprobs, tail_logprob and entropy (or None) of record `number`."""
    generator = torch.Generator().manual_seed(number)
    logits = 4 * torch.randn(number % 7, VOCAB, generator=generator)
    logprobs, ids = torch.log_softmax(logits, 1).topk(TOPK)
    tail = torch.log1p(-logprobs.double().exp().sum(1)).float()
    return ids, logprobs, tail, None if number % 3 else logprobs.sum(1)


def fill(store, numbers, **settings):
    """Append records."""
    with store.writer(**settings) as writer:
        for number in numbers:
            writer.append(*ids_of(number), *laws_of(number))


def check(record, number):
    """A record is what laws_of says, to the precision of its codes."""
    ids, logprobs, tail, entropy = laws_of(number)
    prompt, completion = ids_of(number)
    assert torch.equal(record.prompt_ids, prompt)
    assert torch.equal(record.completion_ids, completion)
    assert torch.equal(record.ids.sort(1).values, ids.int().sort(1).values)
    assert torch.equal(record.tail_logprob, tail)
    if len(ids):
        torch.testing.assert_close(record.logprobs, logprobs, rtol=0, atol=0.1)
    assert (record.entropy is None) == (entropy is None)
    if entropy is not None:
        assert torch.equal(record.entropy, entropy)


@pytest.fixture
def store(tmp_path):
    """An empty one."""
    return create(tmp_path / "store")
