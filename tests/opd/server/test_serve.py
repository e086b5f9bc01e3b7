# SPDX-License-Identifier: Apache-2.0
"""The command: options, tokens, ports, signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch

from opd.cli import main
from opd.clients import connect
from opd.schema import ConfigError
from opd.server.serve import is_loopback, parse_options, read_token

MODEL = "builtin:chain_repair_teacher"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "x"], "opd serve-teacher: port: must be an integer, got 'x'"),
        (["--port", "70000"], "port: must be <= 65535, got '70000'"),
        (["--max-batch-tokens", "0"], "max_batch_tokens: must be >= 1"),
        (["--dtype", "int8"], "dtype: must be 'float32', 'bfloat16' or 'float16', got 'int8'"),
        (["--ssl-certfile", "x.pem"], "ssl_certfile and ssl_keyfile: both are required"),
        (["--host", "0.0.0.0"], "--host: other machines reach '0.0.0.0', so OPD_TEACHER_TOKEN"),
        (["--host", "no.such.name.invalid"], "--host: other machines reach"),
        (["--vocab-size", "46", "--port", "0"], "--vocab-size: the head has 45 tokens, got 46"),
        (["--hidden-rank", "65", "--port", "0"], "--hidden-rank: must be in [1, 64]"),
    ],
)
def test_bad_options_are_one_sentence(words, message, capsys, monkeypatch):
    monkeypatch.delenv("OPD_TEACHER_TOKEN", raising=False)
    assert main(["serve-teacher", "--model", MODEL, "--dtype", "float32", *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last


def test_no_such_model(capsys):
    assert main(["serve-teacher", "--model", "builtin:nothing", "--port", "0"]) == 2
    assert "no builtin model 'nothing'" in capsys.readouterr().err
    assert main(["serve-teacher", "--model", "a/b/c", "--port", "0"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("--model: no model at 'a/b/")


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-teacher", "--model", MODEL, "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_addresses_of_this_machine():
    for host in ("127.0.0.1", "127.3.4.5", "localhost", "::1"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "127.0.0.1.example.org"):
        assert not is_loopback(host)


def test_tokens(monkeypatch):
    monkeypatch.delenv("OPD_TEACHER_TOKEN", raising=False)
    assert read_token("127.0.0.1") == ""
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "short-secret")
    assert read_token("localhost") == "short-secret"
    with pytest.raises(ConfigError, match="of at least 16 characters, got one of 12") as caught:
        read_token("0.0.0.0")
    assert "short-secret" not in str(caught.value)
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "a-token-with a space-in-it")
    with pytest.raises(ConfigError, match="without spaces"):
        read_token("0.0.0.0")
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "x" * 16)
    assert read_token("0.0.0.0") == "x" * 16


def test_options_of_the_command_are_those_of_the_configuration():
    from opd.cli import _parser
    from opd.server.serve import ServeConfig

    options = vars(_parser().parse_args(["serve-teacher", "--model", "x"]))
    assert {*options} - {"run"} == {*ServeConfig.model_fields}
    values = {key: value for key, value in options.items() if key != "run" and value is not None}
    assert parse_options(values) == ServeConfig(model="x")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_after_what_it_had_taken(number):
    variables = {k: v for k, v in os.environ.items() if k != "OPD_TEACHER_TOKEN"}
    command = [sys.executable, "-m", "opd", "serve-teacher", "--model", MODEL, "--port", "0"]
    command += ["--dtype", "float32", "--num-threads", "1", "--merge-ms", "600"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
    )
    try:
        line = server.stdout.readline()
        found = re.search(r"on (http://127\.0\.0\.1:\d+)$", line.strip())
        assert found, line + server.stderr.read()
        client = connect("opd", found[1], deadline_s=20)
        client.info()
        scored = []
        ids = torch.tensor([5, 9, 11, 2, 30])
        asking = threading.Thread(
            target=lambda: scored.extend(client.score([ids], [2], num_topk=3))
        )
        asking.start()
        # it waits 0.6 s for others, so the signal comes while it is held
        asking.join(0.3)
        assert asking.is_alive()
        server.send_signal(number)
        asking.join(10)
        assert len(scored) == 1
        assert server.wait(15) == 0
        assert server.stderr.read().strip().splitlines()[-1] == "stopped"
    finally:
        server.kill()
        server.wait()


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("opd.server")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve-teacher", "--model", MODEL]) == 2
    assert "pip install 'opd-kernels[server]'" in capsys.readouterr().err
