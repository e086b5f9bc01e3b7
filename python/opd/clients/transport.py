# SPDX-License-Identifier: Apache-2.0
"""HTTP to a teacher that may be busy, slow, restarting or dead: retries up to one deadline."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2
import tenacity

from opd.clients.protocol import BadReply, ServerFault, TeacherRefused, TeacherUnavailable

_log = logging.getLogger(__name__)

TOKEN_VARIABLE = "OPD_TEACHER_TOKEN"
# what another try may change: busy, timed out, restarting, a gateway in between
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# what OpenSSL says of a server that speaks plain http
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})
_REMIND_S = 30.0
# with the pauses between them some 20 s: time for an engine that died to take its server along
_MAX_FAULTS = 8


class Damaged(BadReply):
    """A reply that was cut or changed on the way; worth another try."""


class _Transient(Exception):
    def __init__(
        self,
        reason: str,
        retry_after_s: float | None = None,
        status: int | None = None,
        *,
        silent: bool = False,
    ) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.status = status
        # no answer in time: says neither that the server works nor that it fails
        self.silent = silent


class Transport:
    """Requests to one server.

    Args:
        url: http(s)://host[:port], a path prefix allowed; no user name or password in it.
        token_variable: environment variable with the bearer token; none is sent if it is not set.
        request_timeout_s: of one try, without a byte from the server.
        max_reply_bytes: a longer reply is refused while it comes in.
        transport: of httpx, for tests.

    Raises:
        TeacherRefused: a URL that is none, or that carries a password.
    """

    def __init__(
        self,
        url: str,
        *,
        token_variable: str = TOKEN_VARIABLE,
        request_timeout_s: float = 120.0,
        # the head of a large model has several GiB
        max_reply_bytes: int = 1 << 34,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = _checked_url(url)
        self._max_reply_bytes = max_reply_bytes
        self._token_variable = token_variable
        self._request_timeout_s = request_timeout_s
        token = os.environ.get(token_variable, "").strip()
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise TeacherRefused(f"{token_variable}: must be printable ASCII without spaces")
        self._client = httpx2.Client(
            base_url=self.url,
            # compressed floats are hardly smaller, and a short reply could unpack to a huge one
            headers={"accept-encoding": "identity"} | _authorization(token),
            limits=httpx2.Limits(max_connections=64, max_keepalive_connections=64),
            # a proxy of the environment does not lead to this machine
            trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
            follow_redirects=False,
            verify=_certificates(),
            transport=transport,
        )
        self._wait = tenacity.wait_exponential_jitter(multiplier=0.2, max=10.0, jitter=0.5)
        self._reminded = threading.Lock()
        self._last_reminder = -_REMIND_S
        # by path, what a call left at its deadline: slow faults do not reach the limit in one call
        self._faults: dict[str, int] = {}

        # of what is under way, for `close`
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self._deadlines: weakref.WeakSet[Deadline] = weakref.WeakSet()
        self._under_way = threading.Lock()

    def close(self) -> None:
        """Let go of the connections; calls under way in other threads end as at their deadline."""
        with self._under_way:
            streams, deadlines = list(self._streams), list(self._deadlines)
        for deadline in deadlines:
            deadline.cancel()
        for stream in streams:
            # closing alone does not wake a thread that reads
            with contextlib.suppress(OSError):
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._client.close()

    def _note(self, event: str, info: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._under_way:
                self._streams.add(info["return_value"])

    def call(
        self,
        method: str,
        path: str,
        *,
        deadline: Deadline,
        parse: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """One request, tried until it succeeds, is refused, or the deadline is there.

        Args:
            parse: of (body, headers of the reply); what it returns is returned. `Damaged` from it
                is tried again.

        Raises:
            HttpRefused: a status that another try does not change.
            TeacherUnavailable: the deadline.
            BadReply: the reply came whole and is wrong, or came damaged three times.
            ServerFault: status 500 eight times in a row, over the calls of this path.
        """
        damaged, faults = 0, self._faults.get(path, 0)
        with self._under_way:
            self._deadlines.add(deadline)
        reason: _Transient | None = None

        def attempt() -> Any:
            nonlocal damaged, faults, reason
            if reason is not None and deadline.left() <= 0:
                # the sleep was cut short: no time for a try whose failure would hide the reason
                raise reason
            try:
                body, reply = self._once(method, path, deadline, content, headers or {})
            except _Transient as error:
                reason = error
                if error.status == 500:
                    faults += 1
                elif not error.silent:
                    faults = 0
                    self._faults.pop(path, None)
                if faults >= _MAX_FAULTS:
                    self._faults.pop(path, None)
                    raise ServerFault(
                        f"teacher {self.url}: {path} failed {faults} times in a row ({error}): it "
                        "runs, and cannot do what is asked; its log should say why"
                    ) from None
                raise
            faults = 0
            self._faults.pop(path, None)
            try:
                return body if parse is None else parse(body, reply.headers)
            except Damaged as error:
                damaged += 1
                if damaged == 3:
                    raise BadReply(f"{error}, three times in a row") from None
                raise _Transient(str(error)) from None

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Transient),
            wait=self._wait_for,
            stop=lambda state: deadline.left() <= 0,
            sleep=deadline.sleep,
            before_sleep=lambda state: self._tell(state, deadline),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except _Transient as error:
            if faults:
                self._faults[path] = faults
            raise TeacherUnavailable(
                f"teacher {self.url} gave no answer within {deadline.seconds:g} s ({error}); see "
                "that it runs and raise the deadline if it is only slow; the requests that it had "
                "answered are kept"
            ) from None

    def _once(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        content: bytes | None,
        headers: Mapping[str, str],
    ) -> tuple[bytearray, httpx2.Response]:
        # a try must not outlast the deadline
        longest = max(0.1, min(self._request_timeout_s, deadline.left()))
        request = self._client.build_request(
            method,
            path,
            content=content,
            headers=dict(headers),
            timeout=httpx2.Timeout(longest, connect=min(10.0, longest)),
            extensions={"trace": self._note},
        )
        try:
            reply = self._client.send(request, stream=True)
            try:
                body = self._read(reply, deadline)
            finally:
                reply.close()
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            self._refuse_tls(error)
            silent = isinstance(error, httpx2.ReadTimeout)
            raise _Transient(_words(error), silent=silent) from None
        if reply.status_code in _TRANSIENT:
            raise _Transient(
                f"status {reply.status_code}, {_message(body)}",
                _retry_after(reply.headers),
                reply.status_code,
            )
        if reply.status_code == 401:
            raise TeacherRefused(
                f"teacher {self.url}: refused the token (status {reply.status_code}); set "
                f"{self._token_variable} to the one that the server was started with"
            )
        if reply.status_code != 200:
            raise HttpRefused(self.url, path, reply.status_code, _message(body))
        return body, reply

    def _refuse_tls(self, error: BaseException | None) -> None:
        """What another try does not change: a certificate, a server without https."""
        while error is not None and not isinstance(error, ssl.SSLError):
            error = error.__cause__ or error.__context__
        if isinstance(error, ssl.SSLCertVerificationError):
            raise TeacherRefused(
                f"teacher {self.url}: its certificate is not accepted ({error.verify_message}); "
                "set SSL_CERT_FILE to a file with the certificate of whoever signed it"
            ) from None
        if error is not None and error.reason in _NO_TLS:
            raise TeacherRefused(
                f"teacher {self.url}: answers without https; begin the URL with http://"
            ) from None

    def _read(self, reply: httpx2.Response, deadline: Deadline) -> bytearray:
        # one that grows in place: tensors are views of it, see `opd.wire`
        body = bytearray()
        for part in reply.iter_bytes():
            body += part
            if len(body) > self._max_reply_bytes:
                raise BadReply(
                    f"teacher {self.url}: a reply of more than {self._max_reply_bytes} bytes; ask "
                    "for fewer sequences at a time, or raise max_reply_bytes"
                )
            if deadline.left() <= 0:
                raise _Transient("the reply was still coming in", silent=True)
        return body

    def _wait_for(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = getattr(error, "retry_after_s", None)
        backoff = self._wait(state)
        return backoff if asked is None else max(asked, backoff)

    def _tell(self, state: tenacity.RetryCallState, deadline: Deadline) -> None:
        """Once per half minute, however many threads wait."""
        now = time.monotonic()
        with self._reminded:
            if now - self._last_reminder < _REMIND_S:
                return
            self._last_reminder = now
        error = state.outcome.exception() if state.outcome else None
        _log.warning(
            "teacher %s does not answer (%s) since %.0f s; trying for %.0f s more, nothing is "
            "lost. Start it again if it is down",
            self.url,
            error,
            deadline.seconds - deadline.left(),
            deadline.left(),
        )


class HttpRefused(TeacherRefused):
    """A status that says that the request is at fault."""

    def __init__(self, url: str, path: str, status: int, message: str) -> None:
        # a server that knows the path says what it did not find
        if status == 404 and message.rstrip(".").lower() in ("not found", "no reason given"):
            hint = "; is the URL that of another kind of server, or has it a path too much?"
        else:
            hint = ""
        super().__init__(f"teacher {url}: {path} was refused with status {status}: {message}{hint}")
        self.status = status
        self.reason = message


class Deadline:
    """A point in time, so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._cancelled = threading.Event()

    def left(self) -> float:
        """Seconds until then; 0 once cancelled."""
        return 0.0 if self._cancelled.is_set() else self._end - time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Until then at most, and not when cancelled."""
        self._cancelled.wait(max(0.0, min(seconds, self.left())))

    def cancel(self) -> None:
        """Let everyone who waits give up."""
        self._cancelled.set()


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The system's, read once: that takes longer than a request."""
    return httpx2.create_ssl_context()


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise TeacherRefused(f"teacher server: {error} in its URL") from None
    if parts.username or parts.password:
        # not shown: this is where the password is
        raise TeacherRefused(
            f"teacher server: its URL holds a user name or password; put the token in "
            f"{TOKEN_VARIABLE} instead"
        )
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise TeacherRefused(
            f"teacher server: the URL must look like http://host:port, got {url!r}"
        )
    return url.rstrip("/")


def _authorization(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(max(seconds, 0.0), 60.0) if seconds == seconds else None


def _message(body: bytes | bytearray) -> str:
    """What a server says in the body of an error, in one short line."""
    import json

    text = body[:2000].decode("utf-8", "replace")
    try:
        found = json.loads(body) if len(body) < 100_000 else None
    except (ValueError, RecursionError):
        found = None
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    if isinstance(found, dict) and isinstance(found.get("message"), str):
        found = found["message"]
    if isinstance(found, str):
        text = found
    return " ".join(text.split())[:300] or "no reason given"


def _words(error: Exception) -> str:
    kinds = {
        httpx2.ConnectError: "cannot connect",
        httpx2.ConnectTimeout: "cannot connect in time",
        httpx2.ReadTimeout: "no reply in time",
        httpx2.RemoteProtocolError: "the connection broke",
        httpx2.ReadError: "the connection broke",
    }
    return kinds.get(type(error), f"{type(error).__name__}: {error}")
