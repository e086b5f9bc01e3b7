# SPDX-License-Identifier: Apache-2.0
"""The endpoints, as an ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from opd.server.batcher import Batcher, Closing, Job, QueueFull
from opd.server.engine import Engine
from opd.server.monitor import CONTENT_TYPE as METRICS_TYPE
from opd.server.monitor import Monitor
from opd.server.replies import json_body, reply_body
from opd.server.requests import RequestError, Signal, parse_request
from opd.wire import CONTENT_TYPE, pack

_log = logging.getLogger(__name__)
_SCORES: dict[str, Signal] = {
    "/v1/topk": "topk",
    "/v1/token_logprobs": "token_logprobs",
    "/v1/hidden_states": "hidden",
}
# read in less time than a thread takes to wake up
_SMALL_BODY = 1 << 16
# nobody waits for this reply
_GONE = 499
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppSettings:
    """How requests are taken.

    Attributes:
        token: that every request but /health must bear; "" for none.
        max_batch_tokens, max_queue, merge_s: of `Batcher`.
        body_timeout_s: a body that is not there by then is refused.
        hosts: names in the Host header that are served; empty: any. Keeps web pages, whose names
            can be made to point here, from a server without a token.
    """

    token: str = ""
    max_batch_tokens: int = 16_384
    max_queue: int = 64
    merge_s: float = 0.005
    body_timeout_s: float = 60.0
    hosts: tuple[str, ...] = ()


class Server:
    """State of one application."""

    def __init__(self, engine: Engine, settings: AppSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.monitor = Monitor(lambda: self.batcher.num_requests)
        self.batcher: Batcher
        self._heads: dict[bool, asyncio.Task[bytes]] = {}

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Work begins with the event loop, and ends with what has been taken."""
        self.batcher = Batcher(
            self.engine.score,
            max_batch_tokens=self.settings.max_batch_tokens,
            max_queue=self.settings.max_queue,
            merge_s=self.settings.merge_s,
            observe=self.monitor.observe_batch,
        )
        self.batcher.start()
        yield
        await self.batcher.close()

    async def health(self, request: Request) -> Response:
        """200 while requests are taken."""
        if self.batcher.is_closing:
            raise RequestError(503, "the server is about to stop")
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        return Response(self.monitor.text(), headers={"content-type": METRICS_TYPE})

    async def info(self, request: Request) -> Response:
        """What is served, and the limits of a request; the hash is of `vocab_size` tokens."""
        engine = self.engine
        known = engine.limits.vocab_size
        asked = request.query_params.get("vocab_size", str(known))
        if not re.fullmatch(r"[1-9]\d{0,8}", asked, re.ASCII):
            raise RequestError(422, f"vocab_size must be a number of tokens, got {asked[:20]!r}")
        size = min(int(asked), known)
        return _json(
            {
                "model": engine.name,
                "fingerprint": engine.fingerprint,
                "tokenizer_hash": engine.tokenizer_hash(size),
                "dtype": engine.dtype,
                "max_batch_tokens": self.settings.max_batch_tokens,
                **asdict(engine.limits),
            }
        )

    async def head(self, request: Request) -> Response:
        """The head for clients of hidden states; made once and kept."""
        wanted = request.query_params.get("projected", "0")
        if wanted not in ("0", "1"):
            raise RequestError(422, f"projected must be 0 or 1, got {wanted[:20]!r}")
        projected = wanted == "1"
        if projected and self.engine.projection is None:
            raise RequestError(422, "projected: this server was started without --hidden-rank")
        if projected not in self._heads:
            make = partial(self._pack_head, projected)
            self._heads[projected] = asyncio.create_task(self.batcher.run(make))
        try:
            # one client that leaves must not take it from the others
            body = await asyncio.shield(self._heads[projected])
        except Exception:
            self._heads.pop(projected, None)
            raise
        return Response(body, headers={"content-type": CONTENT_TYPE})

    def _pack_head(self, projected: bool) -> bytes:
        tensors, meta = self.engine.head_tensors(projected=projected)
        return pack(tensors, meta)

    async def score(self, request: Request) -> Response:
        """The three endpoints that score sequences."""
        try:
            self.batcher.check_room()
            body = await self._body(request)
            signal = _SCORES[request.url.path]
            kind = request.headers.get("content-type", "")
            parse = partial(
                parse_request, body, content_type=kind, signal=signal, limits=self.engine.limits
            )
            parsed = parse() if len(body) <= _SMALL_BODY else await asyncio.to_thread(parse)
            job = self.batcher.submit(parsed)
        except QueueFull as error:
            wait = {"retry-after": str(error.retry_after_s)}
            raise RequestError(429, str(error), wait) from None
        except Closing as error:
            raise RequestError(503, str(error), {"retry-after": "5"}) from None
        if not await self._wait_for(job, request):
            self.monitor.cancelled.inc()
            return Response(status_code=_GONE)
        reply, headers = await asyncio.to_thread(
            reply_body, parsed, job.future.result(), self.engine.fingerprint
        )
        self.monitor.rows.labels(signal).inc(parsed.num_rows)
        self.monitor.reply_bytes.inc(len(reply))
        return Response(reply, headers=headers)

    async def _wait_for(self, job: Job, request: Request) -> bool:
        """Whether the job was done before its client went away."""
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({job.future, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not job.future.done():
                self.batcher.cancel(job)
        return not job.future.cancelled()

    async def _body(self, request: Request) -> bytes:
        """The body, refused as soon as it is too long or too late."""
        most = self.engine.limits.max_request_bytes
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > most:
            raise RequestError(413, f"a body has at most {most} bytes, got {length[:20]}")
        parts, total = [], 0
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for part in request.stream():
                    total += len(part)
                    if total > most:
                        raise RequestError(413, f"a body has at most {most} bytes")
                    parts.append(part)
        except TimeoutError:
            raise RequestError(
                408, f"the body was not there after {self.settings.body_timeout_s:g} s"
            ) from None
        return b"".join(parts)

    def guarded(self, handler: Handler, *, is_open: bool = False) -> Handler:
        """The handler behind the token, with its errors as replies and its time on /metrics."""

        async def endpoint(request: Request) -> Response:
            begin = time.perf_counter()
            response = await self._answer(handler, request, is_open)
            path = request.url.path
            self.monitor.requests.labels(path, str(response.status_code)).inc()
            self.monitor.seconds.labels(path).observe(time.perf_counter() - begin)
            return response

        return endpoint

    async def _answer(self, handler: Handler, request: Request, is_open: bool) -> Response:
        try:
            self._check_host(request)
            if not is_open:
                self._check_token(request)
            return await handler(request)
        except RequestError as error:
            return _error(error.status, str(error), error.headers)
        except ClientDisconnect:
            self.monitor.cancelled.inc()
            return Response(status_code=_GONE)
        except asyncio.CancelledError:
            raise
        except Exception:
            # what went wrong inside is for the log, not for the client
            _log.exception("%s failed", request.url.path)
            return _error(500, "the server failed; its log says how")

    def _check_host(self, request: Request) -> None:
        hosts = self.settings.hosts
        name = request.headers.get("host", "").lower()
        name = name.rpartition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
        if hosts and name not in hosts:
            raise RequestError(
                403, "without a token only this machine's own names are served, see --host"
            )

    def _check_token(self, request: Request) -> None:
        if not self.settings.token:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # digests have one length whatever was sent
        same = hmac.compare_digest(_digest(given.strip()), _digest(self.settings.token))
        if scheme.lower() != "bearer" or not same:
            raise RequestError(
                401,
                "needs the server's token: Authorization: Bearer ...",
                {"www-authenticate": "Bearer"},
            )


def build_app(engine: Engine, settings: AppSettings) -> Starlette:
    """The application of a model."""
    server = Server(engine, settings)
    routes = [
        Route("/health", server.guarded(server.health, is_open=True), methods=["GET"]),
        Route("/metrics", server.guarded(server.metrics), methods=["GET"]),
        Route("/v1/info", server.guarded(server.info), methods=["GET"]),
        Route("/v1/head", server.guarded(server.head), methods=["GET"]),
        *(Route(path, server.guarded(server.score), methods=["POST"]) for path in _SCORES),
    ]

    def plain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, error.detail)

    app = Starlette(
        routes=routes, lifespan=server.lifespan, exception_handlers={HTTPException: plain}
    )
    app.state.server = server
    return app


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _digest(text: str) -> bytes:
    return hmac.digest(b"opd", text.encode(), "sha256")


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None):
    body, own = json_body(value)
    return Response(body, status_code=status, headers=own | (headers or {}))


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": {"status": status, "message": message}}, status, headers)
