# SPDX-License-Identifier: Apache-2.0
"""A teacher's law over HTTP, end to end: our binary frames against JSON, the best K per token.

A server of its own process scores texts, and both forms carry the same law, to the bit. JSON is
per text lists of K ids and K log-probs a row, a form like TRL's and SGLang's, written by Python's
`json.dumps` and read with `json.loads` and `torch.tensor`. SGLang's /generate writes by orjson,
which takes less time and is not measured: the ratio is that of Python's json. vLLM's, a map of
{logprob, rank, decoded_token} per token, is three times as long and takes four times as long to
write and read: this is the lighter of the two.

`stored`: the teacher has scored these texts before, so that requests, replies and their checks are
all of the time: the transport alone. `live`: it is a model of one narrow layer over 2K tokens. Its
forward pass takes as long whatever carries the law, so it bounds the ratio, which is near 1 with a
teacher whose forward pass is nearly all of the time; the share of it is measured beside.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


def serve_stored(path: str) -> None:
    """A server whose teacher has scored every text before: only the transport is left."""
    from opd.server import serve

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
    serve.serve(serve.parse_options({**OPTIONS, "model": path}))


@contextlib.contextmanager
def serving(path: Path, teacher: str) -> Iterator[str]:
    """URL of a server."""
    code = f"from opd.server.serve import *; serve(parse_options({OPTIONS | {'model': str(path)}}))"
    if teacher == "stored":
        code = f"from benchmarks.bench_teacher_transport import *; serve_stored({str(path)!r})"
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
        server.wait(20)


@pytest.mark.parametrize("num_topk", [64, 128], ids=["k64", "k128"])
@pytest.mark.parametrize("teacher", ["stored", "live"])
def bench_topk(benchmark, tmp_path, teacher, num_topk):
    """ids, log-probs, tail, entropy and the token's own log-prob of every token."""
    save_model(tmp_path, 2 * num_topk)
    with serving(tmp_path, teacher) as url:
        compare(benchmark, url, teacher, num_topk)
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


def compare(benchmark, url: str, teacher: str, num_topk: int) -> None:
    """Binary and JSON in turns, the same law to the bit."""
    from opd.clients import connect

    torch.manual_seed(0)
    vocab_size = 2 * num_topk
    texts = list(torch.randint(0, vocab_size, (NUM_SEQUENCES, LENGTH)))
    starts = [PROMPT] * NUM_SEQUENCES

    def asking(wire):
        client = connect("opd", url, vocab_size=vocab_size, wire=wire, concurrency=2)
        return lambda: client.score(texts, starts, num_topk=num_topk)

    variants = {harness.OURS: asking("binary"), "JSON": asking("json")}
    ours, theirs = (variants[name]() for name in variants)
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
