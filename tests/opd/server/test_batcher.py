# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from opd.server.batcher import Batcher, Closing, QueueFull, padded_batches
from opd.server.requests import ScoreRequest


def request(*lengths):
    return ScoreRequest(
        signal="topk",
        sequences=[torch.ones(length, dtype=torch.int64) for length in lengths],
        starts=[1] * len(lengths),
        query_ids=None,
        num_topk=1,
        temperature=1.0,
        vocab_size=2,
        dtype=torch.float32,
        is_projected=False,
        is_json=False,
        crc32=0,
    )


class Scorer:
    """Rows that name their sequence; waits at a gate if it has one."""

    def __init__(self, gate=None, fail=()):
        self.batches = []
        self.gate = gate
        self.fail = set(fail)

    def __call__(self, pieces):
        self.batches.append([len(piece.ids) for piece in pieces])
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.fail & set(self.batches[-1]):
            raise RuntimeError("broken")
        return [{"x": torch.tensor([len(piece.ids)])} for piece in pieces]


def run(scorer, body, **settings):
    async def main():
        batcher = Batcher(scorer, **{"max_batch_tokens": 100, "max_queue": 9, **settings})
        batcher.start()
        try:
            return await asyncio.wait_for(body(batcher), 10)
        finally:
            await batcher.close()

    return asyncio.run(main())


async def started(scorer):
    while not scorer.batches:
        await asyncio.sleep(0.001)


def test_requests_are_merged_and_come_back_to_their_own():
    scorer = Scorer()

    async def body(batcher):
        jobs = [batcher.submit(request(*lengths)) for lengths in ((5, 7), (6,), (8, 9))]
        return [[int(rows["x"]) for rows in await job.future] for job in jobs]

    assert run(scorer, body) == [[5, 7], [6], [8, 9]]
    assert scorer.batches == [[9, 8, 7, 6, 5]]


def test_batches_keep_to_the_budget_with_their_padding():
    seen = []

    async def body(batcher):
        jobs = [batcher.submit(request(*[10] * 7, 90, 40)) for _ in range(3)]
        for job in jobs:
            assert len(await job.future) == 9

    scorer = Scorer()
    run(scorer, body, observe=lambda *numbers: seen.append(numbers))
    assert all(max(batch) * len(batch) <= 100 for batch in scorer.batches)
    assert sum(map(len, scorer.batches)) == 27
    assert sum(numbers[0] for numbers in seen) == 27


def test_a_sequence_above_the_budget_runs_alone():
    scorer = Scorer()

    async def body(batcher):
        return [int(rows["x"]) for rows in await batcher.submit(request(5, 500, 6)).future]

    assert run(scorer, body) == [5, 500, 6]
    assert [500] in scorer.batches


def test_padded_batches_sorts_by_length():
    from opd.server.engine import Piece

    made = request(3, 50, 4, 49)
    window = [(None, Piece(made, i)) for i in range(4)]
    cut = [[len(piece.ids) for _, piece in batch] for batch in padded_batches(window, 100)]
    assert cut == [[50, 49], [4, 3]]
    assert padded_batches([], 100) == []


def test_a_full_queue_refuses_and_says_when_to_come_back():
    gate = threading.Event()
    scorer = Scorer(gate)

    async def body(batcher):
        jobs = [batcher.submit(request(5)) for _ in range(2)]
        with pytest.raises(QueueFull) as caught:
            batcher.submit(request(5))
        assert 1 <= caught.value.retry_after_s <= 60
        gate.set()
        await asyncio.gather(*(job.future for job in jobs))
        await asyncio.sleep(0)
        assert batcher.num_requests == 0
        await batcher.submit(request(5)).future

    run(scorer, body, max_queue=2)


def test_what_nobody_waits_for_is_not_worked_on():
    gate = threading.Event()
    scorer = Scorer(gate)

    async def body(batcher):
        first = batcher.submit(request(5))
        await started(scorer)
        gone, kept = batcher.submit(request(7, 7)), batcher.submit(request(8))
        batcher.cancel(gone)
        assert batcher.num_requests == 3 - 1 or batcher.num_requests == 3
        gate.set()
        await asyncio.gather(first.future, kept.future)
        assert gone.future.cancelled()

    run(scorer, body)
    assert scorer.batches == [[5], [8]]


def test_a_batch_that_fails_tells_its_requests_and_no_others(caplog):
    scorer = Scorer(fail=[60])

    async def body(batcher):
        bad, good = batcher.submit(request(60, 5)), batcher.submit(request(70))
        with pytest.raises(RuntimeError, match="broken"):
            await bad.future
        assert int((await good.future)[0]["x"]) == 70
        return await batcher.submit(request(4)).future

    assert run(scorer, body, max_batch_tokens=71)
    assert "a batch of" in caplog.text


def test_a_batch_without_memory_is_cut_in_halves():
    calls = []

    def score(pieces):
        calls.append(len(pieces))
        if len(pieces) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{"x": torch.tensor([len(piece.ids)])} for piece in pieces]

    async def body(batcher):
        return [int(rows["x"]) for rows in await batcher.submit(request(3, 4, 5, 6, 7)).future]

    assert run(score, body) == [3, 4, 5, 6, 7]
    assert calls == [5, 2, 3, 1, 2]


def test_closing_finishes_what_was_taken():
    gate = threading.Event()
    scorer = Scorer(gate)

    async def main():
        batcher = Batcher(scorer, max_batch_tokens=5, max_queue=9, merge_s=5.0)
        batcher.start()
        jobs = [batcher.submit(request(5)) for _ in range(3)]
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Closing):
            batcher.submit(request(5))
        gate.set()
        await asyncio.wait_for(closing, 10)
        assert all(job.future.done() for job in jobs)

    asyncio.run(main())
    assert len(scorer.batches) == 3
