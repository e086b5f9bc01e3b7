# SPDX-License-Identifier: Apache-2.0
"""Requests of many clients in one forward pass: merged up to a budget of tokens, one worker."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from opd.server.engine import Piece, Rows
from opd.server.requests import ScoreRequest

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """No room for a further request.

    Attributes:
        retry_after_s: when there may be.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full, try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Closing(Exception):
    """The server is about to stop."""


@dataclass(eq=False)
class Job:
    """A request on its way; `cancelled` drops what of it has not begun."""

    request: ScoreRequest
    future: asyncio.Future[list[Rows]]
    results: list[Rows | None]
    cancelled: bool = False
    next_piece: int = 0
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.results)

    @property
    def is_over(self) -> bool:
        """Nobody waits for it any more."""
        return self.cancelled or self.future.done()


class Batcher:
    """A queue in front of one worker thread.

    Args:
        score: (pieces) -> their rows; runs in the worker thread, one call at a time.
        max_batch_tokens: of a forward pass, padding included; a longer sequence runs alone.
        max_queue: requests that wait or run; a further one is refused.
        merge_s: how long a batch that is not full waits for more.
        observe: called with (sequences, tokens, padded tokens, seconds) of each pass.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Piece]], list[Rows]],
        *,
        max_batch_tokens: int,
        max_queue: int,
        merge_s: float = 0.005,
        observe: Callable[[int, int, int, float], None] = lambda *numbers: None,
    ) -> None:
        self._score = score
        self._max_batch_tokens = max_batch_tokens
        self._max_queue = max_queue
        self._merge_s = merge_s
        self._observe = observe
        self._waiting: deque[Job] = deque()
        self._jobs: set[Job] = set()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "teacher")
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._tokens_per_s = 0.0

    @property
    def num_requests(self) -> int:
        """That wait or run."""
        return len(self._jobs)

    @property
    def is_closing(self) -> bool:
        """No further request is taken."""
        return self._closing

    def start(self) -> None:
        """Begin to work; in the event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Finish what has been taken, then stop."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown(wait=True)

    def check_room(self) -> None:
        """Refuse early, before a body is read.

        Raises:
            QueueFull, Closing.
        """
        if self._closing:
            raise Closing("the server is about to stop")
        if len(self._jobs) >= self._max_queue:
            raise QueueFull(self._retry_after())

    def submit(self, request: ScoreRequest) -> Job:
        """Queue a request; its `future` has the rows of each sequence.

        Raises:
            QueueFull, Closing.
        """
        self.check_room()
        future = asyncio.get_running_loop().create_future()
        job = Job(request, future, [None] * len(request.sequences))
        self._jobs.add(job)
        future.add_done_callback(lambda _: self._jobs.discard(job))
        self._waiting.append(job)
        self._wake.set()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for this one any more."""
        job.cancelled = True
        job.future.cancel()

    async def run(self, function: Callable[[], Any]) -> Any:
        """Something else that needs the model's device, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._waiting and self._queued_tokens() < self._max_batch_tokens:
                # a moment for others to come; not when it stops
                await asyncio.sleep(0 if self._closing else self._merge_s)
            while window := self._window():
                for batch in padded_batches(window, self._max_batch_tokens):
                    await self._work(batch)
            if self._closing and not self._waiting:
                return

    def _queued_tokens(self) -> int:
        return sum(job.request.num_tokens for job in self._waiting)

    def _window(self) -> list[tuple[Job, Piece]]:
        """First come, first served: the next sequences, up to the budget."""
        window: list[tuple[Job, Piece]] = []
        tokens = 0
        while self._waiting and tokens < self._max_batch_tokens:
            job = self._waiting[0]
            if job.is_over or job.next_piece == len(job.results):
                self._waiting.popleft()
                continue
            piece = Piece(job.request, job.next_piece)
            if window and tokens + len(piece.ids) > self._max_batch_tokens:
                break
            window.append((job, piece))
            tokens += len(piece.ids)
            job.next_piece += 1
        return window

    async def _work(self, batch: list[tuple[Job, Piece]]) -> None:
        batch = [(job, piece) for job, piece in batch if not job.is_over]
        if not batch:
            return
        pieces = [piece for _, piece in batch]
        tokens = sum(len(piece.ids) for piece in pieces)
        begin = time.perf_counter()
        try:
            found = await self.run(lambda: self._score_in_parts(pieces))
        except Exception as error:
            # one bad batch must not stop the server; its requests are told
            _log.exception("a batch of %d sequences failed", len(pieces))
            for job in {job for job, _ in batch}:
                if not job.future.done():
                    job.future.set_exception(error)
            return
        seconds = time.perf_counter() - begin
        padded = max(len(piece.ids) for piece in pieces) * len(pieces)
        self._tokens_per_s = tokens / max(seconds, 1e-6)
        self._observe(len(pieces), tokens, padded, seconds)
        for (job, piece), rows in zip(batch, found, strict=True):
            job.results[piece.index] = rows
            job.left -= 1
            if not job.left and not job.future.done():
                job.future.set_result([rows for rows in job.results if rows is not None])

    def _score_in_parts(self, pieces: list[Piece]) -> list[Rows]:
        """Halves of a batch that the GPU has no memory for."""
        try:
            return self._score(pieces)
        except torch.OutOfMemoryError:
            if len(pieces) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(pieces) // 2
        return self._score_in_parts(pieces[:middle]) + self._score_in_parts(pieces[middle:])

    def _retry_after(self) -> int:
        seconds = self._queued_tokens() / self._tokens_per_s if self._tokens_per_s else 1.0
        return min(60, max(1, math.ceil(seconds)))


def padded_batches(
    window: list[tuple[Job, Piece]], max_batch_tokens: int
) -> list[list[tuple[Job, Piece]]]:
    """Cut into batches of similar lengths, each within the budget with its padding."""
    batches: list[list[tuple[Job, Piece]]] = []
    for entry in sorted(window, key=lambda entry: -len(entry[1].ids)):
        # the longest comes first, and is what the others are padded to
        longest = len(batches[-1][0][1].ids) if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > max_batch_tokens:
            batches.append([])
        batches[-1].append(entry)
    return batches
