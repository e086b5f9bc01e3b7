# SPDX-License-Identifier: Apache-2.0
"""A teacher's law over HTTP, end to end: our binary frames against JSON, the best K per token.

A server of its own process scores texts, and both forms carry the same law, to the bit. JSON is
per text lists of K ids and K log-probs a row, a form like TRL's and SGLang's, written by Python's
`json.dumps` and read with `json.loads` and `torch.tensor`. SGLang's /generate writes by orjson:
where that is installed it is a variant beside, on both sides; the goal is of Python's json. vLLM's,
a map of {logprob, rank, decoded_token} per token, is three times as long and takes four times as
long to write and read: this is the lighter of the two.

`stored`: the teacher has scored these texts before, so that requests, replies and their checks are
all of the time: the transport alone. `live`: it is a model of one narrow layer over 2K tokens. Its
forward pass takes as long whatever carries the law, so it bounds the ratio, which is near 1 with a
teacher whose forward pass is nearly all of the time; the share of it is measured beside.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch
from urllib.request import urlopen

import pytest
import torch

from benchmarks import harness

NUM_SEQUENCES = 16
LENGTH = 512
PROMPT = 64
OPTIONS = {"dtype": "float32", "port": 0, "num_threads": 2, "merge_ms": 0}


def save_model(path: Path, vocab_size: int) -> None:
    """A random Llama of one narrow layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def serve(path: str, teacher: str, *, with_orjson: bool) -> None:
    """A server, in this process."""
    from opd.server import serve

    if with_orjson:
        write_by_orjson()
    if teacher == "stored":
        remember(serve)
    serve.serve(serve.parse_options({**OPTIONS, "model": path}))


def write_by_orjson() -> None:
    """The server's JSON."""
    import orjson

    from opd.server import replies

    def json_body(value):
        body = orjson.dumps(value)
        checksum = replies.json_checksum(body)
        return body, {"content-type": replies.JSON_TYPE, replies.CRC_HEADER: checksum}

    replies.json_body = json_body


def read_by_orjson():
    """The client's JSON, while it lasts."""
    import orjson

    from opd.clients import opd_replies

    return patch.object(opd_replies, "read_json", lambda body, where: orjson.loads(body))


def remember(serve) -> None:
    """Every text has been scored before: only the transport is left."""

    class Stored(serve.Engine):
        """Keeps what it has computed."""

        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self._stored = {}

        def score(self, pieces):
            keys = [(piece.ids.numpy().tobytes(), piece.start) for piece in pieces]
            if not all(key in self._stored for key in keys):
                self._stored |= zip(keys, super().score(pieces), strict=True)
            return [self._stored[key] for key in keys]

    serve.Engine = Stored


@contextlib.contextmanager
def serving(path: Path, teacher: str, *, with_orjson: bool = False) -> Iterator[str]:
    """URL of a server in a process of its own."""
    code = (
        "from benchmarks.bench_teacher_transport import serve; "
        f"serve({str(path)!r}, {teacher!r}, with_orjson={with_orjson})"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=harness.ROOT,
    )
    try:
        found = re.search(r"on (http://\S+)$", server.stdout.readline().strip())
        assert found, "the server did not start; run it by hand to see why"
        yield found[1]
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.parametrize("num_topk", [64, 128], ids=["k64", "k128"])
@pytest.mark.parametrize("teacher", ["stored", "live"])
def bench_topk(benchmark, tmp_path, teacher, num_topk):
    """ids, log-probs, tail, entropy and the token's own log-prob of every token."""
    save_model(tmp_path, 2 * num_topk)
    with contextlib.ExitStack() as servers:
        url = servers.enter_context(serving(tmp_path, teacher))
        fast_url = None
        if importlib.util.find_spec("orjson"):
            fast_url = servers.enter_context(serving(tmp_path, teacher, with_orjson=True))
        compare(benchmark, url, fast_url, teacher, num_topk)
    harness.assert_goals(benchmark)


def share_of_forward(url: str, ask: Callable[[], object]) -> float:
    """The part of a call's time that the server's forward passes take, by its own account."""

    def forward_s() -> float:
        with urlopen(f"{url}/metrics") as reply:
            return float(
                re.search(r"^opd_batch_seconds_sum (\S+)$", reply.read().decode(), re.M)[1]
            )

    shares = []
    for _ in range(5):
        before, begin = forward_s(), time.perf_counter()
        ask()
        total = time.perf_counter() - begin
        shares.append((forward_s() - before) / total)
    return statistics.median(shares)


def compare(benchmark, url: str, fast_url: str | None, teacher: str, num_topk: int) -> None:
    """Binary and JSON in turns, the same law to the bit.

    Args:
        benchmark: of pytest.
        url: of a server.
        fast_url: of one whose JSON is by orjson; None: there is none.
        teacher: of the server.
        num_topk: K.
    """
    from opd.clients import connect

    torch.manual_seed(0)
    vocab_size = 2 * num_topk
    texts = list(torch.randint(0, vocab_size, (NUM_SEQUENCES, LENGTH)))
    starts = [PROMPT] * NUM_SEQUENCES

    def asking(wire, url=url):
        client = connect("opd", url, vocab_size=vocab_size, wire=wire, concurrency=2)
        return lambda: client.score(texts, starts, num_topk=num_topk)

    variants = {harness.OURS: asking("binary"), "JSON": asking("json")}
    if fast_url is not None:
        ask = asking("json", fast_url)

        def ask_fast():
            with read_by_orjson():
                return ask()

        variants["JSON by orjson"] = ask_fast
    ours, *others = (variants[name]() for name in variants)
    for theirs in others:
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.logprobs, other.logprobs)
            assert torch.equal(one.tail_logprob, other.tail_logprob)
    benchmark.group = f"teacher transport, {teacher} teacher"
    turns = harness.take_turns(benchmark, variants, rounds=15, slow_rounds=5)
    ratios = harness.record(benchmark, turns, floor=harness.OURS)
    note = ""
    if teacher == "live":
        share = share_of_forward(url, variants[harness.OURS])
        benchmark.extra_info["share_of_forward"] = round(share, 3)
        note = f"The forward pass is {share:.0%} of our time."
    harness.goal(
        benchmark,
        f"JSON's time over that of our binary frames, K = {num_topk}, teacher {teacher}",
        ratios["JSON"],
        at_least=10,
        medians=turns.ratio("JSON", harness.OURS, statistics.median),
        note=note,
    )
