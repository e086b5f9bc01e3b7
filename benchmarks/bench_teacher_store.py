# SPDX-License-Identifier: Apache-2.0
"""The store against its codec alone: what checksums, look-ups and files cost, and bytes on disk."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness
from benchmarks.bench_topk_codec import NUM_TOKENS, VOCAB, laws

NUM_TOPK, LENGTH = 64, 512


@pytest.fixture
def records():
    """(prompt, completion, ids, logprobs, tail, entropy) of completions of LENGTH tokens."""
    ids, logprobs, tail = laws(NUM_TOPK)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    made = []
    for start in range(0, NUM_TOKENS, LENGTH):
        part = slice(start, start + LENGTH)
        completion = torch.arange(start, start + LENGTH)
        prompt = torch.arange(64)
        made.append((prompt, completion, ids[part], logprobs[part], tail[part], entropy[part]))
    return made


@pytest.mark.parametrize("way", ["append", "get"])
def bench_teacher_store(benchmark, way, records, tmp_path):
    """Append ends with one shard, flushed to the disk; get finds, checks and decodes records."""
    store_package = pytest.importorskip("opd.store")
    fingerprint = store_package.TeacherFingerprint(
        model="bench", config_hash="1", weights_hash="2", tokenizer_hash="3", temperature=1.0
    )
    store = store_package.TeacherStore.create(
        tmp_path / "store", fingerprint=fingerprint, vocab_size=VOCAB, num_topk=NUM_TOPK
    )

    def append() -> None:
        with store.writer() as writer:
            for record in records:
                writer.append(*record)

    def encode() -> list[opk.TopkCodes]:
        return [
            opk.encode_topk(ids, logprobs, vocab_size=VOCAB, tail_logprob=tail)
            for _, _, ids, logprobs, tail, _ in records
        ]

    append()
    codes = encode()
    (shard,) = store.path.glob("shard-*")
    benchmark.extra_info["bytes_per_token"] = shard.stat().st_size / NUM_TOKENS
    for record, code in zip(records, codes, strict=True):
        assert torch.equal(store[record[:2]].logprobs, opk.decode_topk(code).logprobs)
    variants = {
        "append": {"codec": encode, harness.OURS: append},
        "get": {
            "codec": lambda: [opk.decode_topk(code) for code in codes],
            harness.OURS: lambda: [store.get(*record[:2]) for record in records],
        },
    }[way]
    benchmark.group = f"teacher_store {way}"
    harness.compare(benchmark, variants, floor="codec", rounds=5)
