# SPDX-License-Identifier: Apache-2.0
"""Connections that send no request, or half of one, do not keep others out."""

from __future__ import annotations

import contextlib
import socket
from urllib.parse import urlsplit

import pytest

from tests.opd.server.test_app import HEAD, get

MOST = 4 + 64


def _open(url):
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=5)


def _is_closed(line):
    try:
        return line.recv(100) == b""
    except ConnectionResetError:
        # what it had sent was not read
        return True


@pytest.mark.parametrize("sent", ["", HEAD])
def test_a_head_that_does_not_come_is_not_waited_for(live, engine, sent):
    url = live(engine, head_timeout_s=0.3)
    with _open(url) as line:
        line.sendall(sent.encode())
        assert _is_closed(line)


def test_nor_is_the_second_head_of_a_connection(live, engine):
    url = live(engine, head_timeout_s=0.3)
    with _open(url) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /health HT")
        found = b""
        while part := line.recv(1000):
            found += part
        assert found.count(b"200 OK") == 1


def test_connections_without_a_request_give_way_to_those_with_one(live, engine):
    url = live(engine, max_queue=1)
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(_open(url)) for _ in range(MOST + 10)]
        for line in lines:
            line.sendall(b"GET /health HTTP/1.1\r\n")
        assert get(url, "/health").status_code == 200
        # the oldest were closed, the newest may still send the rest
        assert _is_closed(lines[0])
        lines[-1].sendall(b"host: localhost\r\n\r\n")
        assert b"200 OK" in lines[-1].recv(100)
