# SPDX-License-Identifier: Apache-2.0
"""Calls in threads that end with the process.

Python waits for the threads of a ThreadPoolExecutor before it ends: after Ctrl-C, until the request
timeout of a server that says nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any


def start(calls: Sequence[Callable[[], Any]], *, num_threads: int = 1) -> list[Future[Any]]:
    """Run calls in the background, so many at a time; one future each, in their order."""
    waiting: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
    futures: list[Future[Any]] = []
    for call in calls:
        futures.append(Future())
        waiting.put((futures[-1], call))

    def work() -> None:
        while True:
            try:
                future, call = waiting.get_nowait()
            except Empty:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(num_threads, len(calls))):
        threading.Thread(target=work, name="teacher", daemon=True).start()
    return futures
