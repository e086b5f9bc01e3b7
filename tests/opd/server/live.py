# SPDX-License-Identifier: Apache-2.0
"""Servers on a port of this machine, in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import uvicorn

from opd.server.app import AppSettings, build_app
from opd.server.connections import uvicorn_config


@contextlib.contextmanager
def running(engine, port=0, head_timeout_s=10.0, **settings):
    """A server in a thread."""
    listener = socket.create_server(("127.0.0.1", port))
    settings = AppSettings(**settings)
    app = build_app(engine, settings)
    server = uvicorn.Server(
        uvicorn_config(app, max_queue=settings.max_queue, head_timeout_s=head_timeout_s)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
