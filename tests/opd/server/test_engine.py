# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from opd.server.engine import Engine, Piece
from opd.server.requests import parse_request
from opd.wire import CONTENT_TYPE, pack


def request(engine, lengths, starts, signal="topk", **meta):
    generator = torch.Generator().manual_seed(sum(lengths))
    body = pack(
        {
            "token_ids": torch.randint(1, 45, (sum(lengths),), generator=generator).int(),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            "starts": torch.tensor(starts, dtype=torch.int32),
        },
        meta,
    )
    return parse_request(body, content_type=CONTENT_TYPE, signal=signal, limits=engine.limits)


def pieces(*requests):
    return [Piece(r, i) for r in requests for i in range(len(r.sequences))]


def test_requests_of_all_kinds_share_a_forward_pass(engine, monkeypatch):
    calls = []
    forward = engine._model.model.base_model.forward
    monkeypatch.setattr(
        engine._model.model.base_model,
        "forward",
        lambda **k: (calls.append(k["input_ids"].shape), forward(**k))[1],
    )
    requests = [
        request(engine, (9, 4, 6), (3, 4, 1), num_topk=5, temperature=0.7),
        request(engine, (12,), (2,), "token_logprobs"),
        request(engine, (5, 7), (1, 6), "hidden", dtype="float32"),
    ]
    mixed = pieces(*requests)
    # of any order
    mixed = [mixed[i] for i in (5, 0, 3, 2, 4, 1)]
    together = engine.score(mixed)
    # the empty completion is not part of it
    assert calls == [(5, 12)]
    for piece, found in zip(mixed, together, strict=True):
        (alone,) = engine.score([piece])
        assert alone.keys() == found.keys()
        for name, tensor in found.items():
            assert len(tensor) == piece.num_rows
            torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-5)


def test_limits_are_those_of_the_model(teacher, tokenizer):
    limits = Engine(teacher, name="x").limits
    assert (limits.vocab_size, limits.input_size, limits.max_length) == (45, 45, 64)
    assert (limits.max_topk, limits.hidden_size, limits.hidden_rank) == (45, 24, 0)
    limits = Engine(teacher, name="x", max_length=10, max_request_tokens=5, max_topk=7).limits
    assert (limits.max_length, limits.max_request_tokens, limits.max_topk) == (10, 10, 7)
    assert Engine(teacher, name="x", max_length=1000).limits.max_length == 64


def test_only_empty_completions(engine):
    made = request(engine, (4, 3), (4, 3), num_topk=5)
    found = engine.score(pieces(made))
    assert [rows["ids"].shape for rows in found] == [(0, 5), (0, 5)]
    made = request(engine, (4,), (4,), "hidden", projected=True)
    (found,) = engine.score(pieces(made))
    assert found["hidden"].shape == (0, 8) and found["logit_error"].shape == (0,)
