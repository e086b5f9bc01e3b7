# SPDX-License-Identifier: Apache-2.0
"""A teacher's law over HTTP, end to end: our binary frames against JSON, the best 64 per token.

A server of its own process scores texts by a model so small that the transport is most of the time;
both forms carry the same law, to the bit. The tokens per second of a large teacher are those of its
forward pass and do not show what is compared here.
"""

from __future__ import annotations

import contextlib
import re
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
VOCAB_SIZE = 512


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


@contextlib.contextmanager
def serving(path: Path) -> Iterator[str]:
    """URL of `opd serve-teacher`."""
    command = [sys.executable, "-m", "opd", "serve-teacher", "--model", str(path), "--port", "0"]
    command += ["--dtype", "float32", "--num-threads", "1", "--merge-ms", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=harness.ROOT
    )
    try:
        found = re.search(r"on (http://\S+)$", server.stdout.readline().strip())
        assert found, "opd serve-teacher did not start; run it by hand to see why"
        yield found[1]
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Of a running server."""
    path = tmp_path_factory.mktemp("teacher")
    save_model(path)
    with serving(path) as address:
        yield address


def bench_topk(benchmark, url):
    """ids, log-probs, tail, entropy and the token's own log-prob of every token."""
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
    benchmark.group = f"teacher transport top-{NUM_TOPK}"
    turns = harness.take_turns(benchmark, variants, rounds=9, slow_rounds=5)
    ratios = harness.record(benchmark, turns, floor=harness.OURS)
    harness.goal(
        benchmark,
        "JSON's time over that of our binary frames, end to end",
        ratios["JSON"],
        at_least=10,
    )
    harness.assert_goals(benchmark)
