# SPDX-License-Identifier: Apache-2.0
"""The codec against a stand-in of DistillKit's compression: bytes, what is lost, and time."""

from __future__ import annotations

import statistics

import pytest
import torch

import opd_kernels as opk
from benchmarks import distillkit_stand_in as distillkit
from benchmarks import harness

VOCAB = 151_936
NUM_TOKENS = 4096
# K, bits of ours, a scheme of theirs with the same K: k128 is one of its test script, from which
# the others are made
CASES = {
    "k64": (64, 10, distillkit.Scheme(64, 16, (0, 1, 2, 3, 4, 0.5))),
    "k128": (128, 10, distillkit.Scheme(128, 16, (0, 1, 2, 3, 4, 0.5))),
    "k128-bins": (128, 10, distillkit.Scheme(128, 16, (0, 1, 2, 0.5), ((8, 16), (4, 96)))),
}


def laws(num_topk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, logprobs and tail of Zipf-like laws over VOCAB ids, one entry far above in half."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(NUM_TOKENS, 4096, generator=generator)
    logits[::2, 0] += 12
    logprobs, places = torch.log_softmax(logits, 1).topk(num_topk)
    ids = places * (VOCAB // 4096) + torch.randint(0, 37, places.shape, generator=generator)
    tail = torch.log1p(-logprobs.double().exp().sum(1)).float()
    return ids.int(), logprobs, tail


def kl(logprobs, tail, got_ids, got, got_tail, ids) -> float:
    """Mean KL over the K entries and the rest, nats; the decoded law divided by its mass."""
    order, back = ids.long().sort(1), got_ids.long().sort(1)
    assert torch.equal(order.values, back.values)
    one = torch.cat([logprobs.double().gather(1, order.indices), tail[:, None].double()], 1)
    two = torch.cat([got.double().gather(1, back.indices), got_tail[:, None].double()], 1)
    return float((one.exp() * (one - two + two.logsumexp(1, keepdim=True))).sum(1).mean())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["encode", "decode"])
def bench_topk_codec(benchmark, way, name):
    """Their row has no tail: it gets the exact one here, so that only the entries are compared."""
    num_topk, bits, scheme = CASES[name]
    ids, logprobs, tail = laws(num_topk)
    codes = opk.encode_topk(ids, logprobs, vocab_size=VOCAB, tail_logprob=tail, bits=bits)
    theirs = distillkit.encode(ids, logprobs, scheme, VOCAB)
    mine = opk.decode_topk(codes)
    assert (mine.status == 0).all()
    lost = kl(logprobs, tail, mine.ids, mine.logprobs, mine.tail_logprob, ids)
    got_ids, got = distillkit.decode(*theirs, scheme, VOCAB)
    their_loss = kl(logprobs, tail, got_ids, got, tail, ids)
    assert lost < 1e-5
    bytes_of = {harness.OURS: codes.codes.shape[1], "DistillKit": scheme.row_bytes(VOCAB)}
    assert bytes_of["DistillKit"] == theirs[0].shape[1] + theirs[1].shape[1]
    benchmark.extra_info.update(
        bytes_per_token=bytes_of, kl={harness.OURS: lost, "DistillKit": their_loss}
    )
    options = {"vocab_size": VOCAB, "tail_logprob": tail, "bits": bits}
    variants = {
        "encode": {
            harness.OURS: lambda: opk.encode_topk(ids, logprobs, **options),
            "DistillKit": lambda: distillkit.encode(ids, logprobs, scheme, VOCAB),
        },
        "decode": {
            harness.OURS: lambda: opk.decode_topk(codes),
            "DistillKit": lambda: distillkit.decode(*theirs, scheme, VOCAB),
        },
    }[way]
    benchmark.group = f"topk_codec {way} {name}"
    turns = harness.take_turns(benchmark, variants, rounds=5)
    harness.record(benchmark, turns, harness.OURS)
    harness.goal(
        benchmark,
        f"topk_codec, {way} {name}: DistillKit's time over ours",
        turns.ratio("DistillKit", harness.OURS),
        at_least=20,
        medians=turns.ratio("DistillKit", harness.OURS, statistics.median),
        note=f"{bytes_of[harness.OURS]} bytes a token and a KL of {lost:.0e} nats; DistillKit "
        f"{bytes_of['DistillKit']} and {their_loss:.0e}.",
    )
    harness.assert_goals(benchmark)
