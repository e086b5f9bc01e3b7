# SPDX-License-Identifier: Apache-2.0
"""Servers on a port of this machine, in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import uvicorn

from opd.server.app import AppSettings, build_app


@contextlib.contextmanager
def running(engine, port=0, **settings):
    """A server in a thread."""
    listener = socket.create_server(("127.0.0.1", port))
    app = build_app(engine, AppSettings(**settings))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none")
    server = uvicorn.Server(config)
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
