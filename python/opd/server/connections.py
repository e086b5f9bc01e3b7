# SPDX-License-Identifier: Apache-2.0
"""Connections without a request: how long and how many of them there may be.

uvicorn limits the time between two requests, but not that before the first one, nor that of a
request's head; and all connections count against its `limit_concurrency`.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class _Connection(H11Protocol):
    """uvicorn's, closed when no request has come whole to its head in time.

    Attributes:
        head_timeout_s: of a request's head, from the connection or the last reply on.
        max_idle: so many may be without a request; a further one closes the oldest.
        idle: those that are, oldest first.
    """

    head_timeout_s: ClassVar[float]
    max_idle: ClassVar[int]
    idle: ClassVar[dict[_Connection, None]]
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if not is_idle or self.transport.is_closing():
            self._forget()
        elif self._timer is None:
            # bytes that come in do not move it: a head may also be sent too slowly
            self._timer = self.loop.call_later(self.head_timeout_s, self.transport.close)
            self.idle[self] = None
            if len(self.idle) > self.max_idle:
                oldest = next(iter(self.idle))
                oldest._forget()
                oldest.transport.close()

    def _forget(self) -> None:
        self.idle.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def uvicorn_config(
    app: Any, *, max_queue: int = 64, head_timeout_s: float = 10.0, **settings: Any
) -> uvicorn.Config:
    """uvicorn's settings for an application of `build_app`.

    Args:
        app: the application.
        max_queue: of its batcher; half as many connections as there may be may be idle.
        head_timeout_s: of a request's head.
        settings: further ones of uvicorn.
    """
    most = 4 * max_queue + 64
    limits = {"head_timeout_s": head_timeout_s, "max_idle": most // 2, "idle": {}}
    return uvicorn.Config(
        app,
        http=type("Connection", (_Connection,), limits),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        limit_concurrency=most,
        **settings,
    )
