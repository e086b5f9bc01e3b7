# SPDX-License-Identifier: Apache-2.0
"""A teacher's law over HTTP, end to end: our binary frames against JSON, the best 64 per token.

A server of its own process scores texts, and both forms carry the same law, to the bit. `stored`:
it has scored these texts before, so that requests, replies and their checks are all of the time.
`live`: it is a model of one narrow layer. The tokens per second of a large teacher are those of its
forward pass, and do not show what is compared here.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import harness

NUM_SEQUENCES = 16
LENGTH = 512
PROMPT = 64
NUM_TOPK = 64
VOCAB_SIZE = 128
OPTIONS = {"dtype": "float32", "port": 0, "num_threads": 2, "merge_ms": 0}


def save_model(path: Path) -> None:
    """A random Llama of one narrow layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
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


@pytest.mark.parametrize("teacher", ["stored", "live"])
def bench_topk(benchmark, tmp_path, teacher):
    """ids, log-probs, tail, entropy and the token's own log-prob of every token."""
    save_model(tmp_path)
    with serving(tmp_path, teacher) as url:
        compare(benchmark, url, teacher)
    harness.assert_goals(benchmark)


def compare(benchmark, url: str, teacher: str) -> None:
    """Binary and JSON in turns, the same law to the bit."""
    from opd.clients import connect

    torch.manual_seed(0)
    texts = list(torch.randint(0, VOCAB_SIZE, (NUM_SEQUENCES, LENGTH)))
    starts = [PROMPT] * NUM_SEQUENCES

    def asking(wire):
        client = connect("opd", url, vocab_size=VOCAB_SIZE, wire=wire, concurrency=2)
        return lambda: client.score(texts, starts, num_topk=NUM_TOPK)

    variants = {harness.OURS: asking("binary"), "JSON": asking("json")}
    ours, theirs = (variants[name]() for name in variants)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.logprobs, other.logprobs)
        assert torch.equal(one.tail_logprob, other.tail_logprob)
    benchmark.group = f"teacher transport top-{NUM_TOPK}, {teacher} teacher"
    turns = harness.take_turns(benchmark, variants, rounds=15, slow_rounds=5)
    ratios = harness.record(benchmark, turns, floor=harness.OURS)
    if teacher == "stored":
        harness.goal(
            benchmark,
            "JSON's time over that of our binary frames, teacher stored",
            ratios["JSON"],
            at_least=10,
            medians=turns.ratio("JSON", harness.OURS, statistics.median),
        )
