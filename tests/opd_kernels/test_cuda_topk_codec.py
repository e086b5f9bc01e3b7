# SPDX-License-Identifier: Apache-2.0
"""The CUDA codec on a CPU: the bytes, the laws and the statuses of the compiled CPU codec."""

from __future__ import annotations

import random

import pytest
import torch

import opd_kernels as opk
from tests.codec_laws import laws_of
from tests.native import needs_kernels

pytestmark = [pytest.mark.usefixtures("emulated_cuda"), needs_kernels("topk_codec")]

CPU, CUDA = torch.ops.opd, torch.ops.opd_cuda
SHAPES = [(1, 1, 4), (1, 2**31, 8), (5, 7, 16), (64, 151_936, 10), (130, 5000, 7), (300, 300, 12)]


def equal(one, two):
    """Bit for bit."""
    for a, b in zip(one, two, strict=True):
        if a.is_floating_point():
            a, b = a.view(torch.int32), b.view(torch.int32)
        assert torch.equal(a, b)


@pytest.mark.parametrize(("num_topk", "vocab_size", "bits"), SHAPES)
def test_cuda_codec_is_the_cpus(num_topk, vocab_size, bits):
    ids, logprobs, tail = laws_of(7, num_topk, vocab_size)
    options = {"vocab_size": vocab_size, "tail_logprob": tail, "bits": bits}
    cpu = opk.encode_topk(ids, logprobs, **options, backend="cpu")
    cuda = opk.encode_topk(ids, logprobs, **options, backend="cuda")
    assert torch.equal(cpu.codes, cuda.codes)
    laws = opk.decode_topk(cuda, backend="cuda")
    equal(laws, opk.decode_topk(cpu, backend="cpu"))
    assert (laws.status == 0).all()


def test_cuda_codec_refuses_and_reads_damage_as_the_cpu_does():
    rng = random.Random(0)
    ids, logprobs, tail = laws_of(24, 6, 90)
    ids = ids.int()
    ids[0, 0], ids[5, 1], ids[6, 1] = -5, 90, ids[6, 0]
    logprobs[7, 0], logprobs[11, 2], tail[12] = float("nan"), 3.0, float("nan")
    logprobs[13, 5], ids[18, 0] = 0.0, -1
    cpu = CPU.topk_codec_encode(ids, logprobs, tail, 90, 8)
    cuda = CUDA.topk_codec_encode(ids, logprobs, tail, 90, 8)
    equal(cpu, cuda)
    assert set(cpu[1].tolist()) >= {0, 1, 2, 3, 4, 5, 6}
    seen = set()
    for _ in range(30):
        codes = cpu[0].clone()
        for row in codes:
            for _ in range(rng.randrange(4)):
                row[rng.randrange(len(row))] ^= 1 << rng.randrange(8)
        one, two = (ops.topk_codec_decode(codes, 6, 90, 8) for ops in (CPU, CUDA))
        equal(one, two)
        seen |= set(one[3].tolist())
    assert seen == {0, 7, 8, 9, 10, 11}


@pytest.mark.parametrize("seed", ["3", "11"])
def test_cuda_codec_does_not_depend_on_the_order_of_threads(seed, monkeypatch):
    ids, logprobs, tail = laws_of(5, 64, 9000)
    options = {"vocab_size": 9000, "tail_logprob": tail, "backend": "cuda"}
    one = opk.encode_topk(ids, logprobs, **options)
    laws = opk.decode_topk(one, backend="cuda")
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    two = opk.encode_topk(ids, logprobs, **options)
    assert torch.equal(one.codes, two.codes)
    equal(laws, opk.decode_topk(two, backend="cuda"))


def test_cuda_codec_opcheck():
    ids, logprobs, tail = laws_of(3, 6, 90)
    torch.library.opcheck(CUDA.topk_codec_encode, (ids.int(), logprobs, tail, 90, 8))
    codes = opk.encode_topk(ids, logprobs, vocab_size=90, tail_logprob=tail, bits=8).codes
    torch.library.opcheck(CUDA.topk_codec_decode, (codes, 6, 90, 8))
