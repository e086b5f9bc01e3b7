# SPDX-License-Identifier: Apache-2.0
"""The codec of top-k laws: bytes and numbers of the reference, its bounds, hostile input."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opd_kernels as opk
from opd_kernels import reference
from tests.codec_laws import entropy_of, kl_of_codes, laws_of, peaked

INF, NAN = math.inf, math.nan
SHAPES = [
    (1, 1, 4),
    (1, 2**31, 8),
    (2, 2, 16),
    (5, 7, 8),
    (33, 100, 7),
    (64, 151_936, 10),
    (128, 151_936, 12),
    (100, 2**31, 16),
    (4096, 152_064, 8),
]


def equal(one, two):
    """Bit for bit, NaN included."""
    assert one.dtype == two.dtype and one.shape == two.shape
    if one.is_floating_point():
        one, two = one.view(torch.int32), two.view(torch.int32)
    assert torch.equal(one, two)


def equal_laws(one, two):
    for a, b in zip(one, two, strict=True):
        # the reference's NaN has its own bits
        equal(torch.nan_to_num(a.float(), 7.0), torch.nan_to_num(b.float(), 7.0))


def step_bound(logprobs, bits):
    """What the docstring of encode_topk promises, [T, K]."""
    finite = logprobs.double().masked_fill(logprobs == -INF, 0)
    depth = logprobs[:, :1].double() - finite
    depth = torch.where(logprobs == -INF, 0.0, depth)
    last, bend = 2**bits - 2, 2 ** (bits - 2)
    scale = 1.008 * depth.amax(1, keepdim=True) / (last * (last + bend))
    half = ((bend * scale).square() + 4 * depth * scale).sqrt() + scale
    return half / 2 + (depth + logprobs[:, :1].abs()) * 2.0**-24 + 2.0**-126


@pytest.mark.parametrize(("num_topk", "vocab_size", "bits"), SHAPES)
def test_codec_is_the_reference_bit_for_bit(num_topk, vocab_size, bits):
    ids, logprobs, tail = laws_of(6, num_topk, vocab_size)
    options = {"vocab_size": vocab_size, "tail_logprob": tail, "bits": bits}
    codes = opk.encode_topk(ids, logprobs, **options)
    truth = reference.encode_topk(ids, logprobs, **options)
    equal(codes.codes, truth.codes)
    assert codes.codes.shape[1] == opk.topk_row_bytes(num_topk, vocab_size, bits)
    laws = opk.decode_topk(codes)
    equal_laws(laws, reference.decode_topk(truth))
    assert (laws.status == 0).all()


@pytest.mark.parametrize(("num_topk", "vocab_size", "bits"), SHAPES)
def test_round_trip_is_exact_but_for_half_a_step(num_topk, vocab_size, bits):
    ids, logprobs, tail = laws_of(12, num_topk, vocab_size)
    codes = opk.encode_topk(ids, logprobs, vocab_size=vocab_size, tail_logprob=tail, bits=bits)
    laws = opk.decode_topk(codes)
    equal(laws.tail_logprob, tail)
    equal(laws.logprobs[:, 0], logprobs[:, 0])
    # best first, equal ones by id, -1 and -inf last
    one, two = laws.logprobs[:, :-1], laws.logprobs[:, 1:]
    by_id = (laws.ids[:, :-1] < laws.ids[:, 1:]) | (laws.ids[:, 1:] == -1)
    assert ((one > two) | ((one == two) & by_id)).all()
    order, back = ids.long().sort(1), laws.ids.long().sort(1)
    assert torch.equal(order.values, back.values)
    given, got = logprobs.gather(1, order.indices), laws.logprobs.gather(1, back.indices)
    assert torch.equal(given == -INF, got == -INF)
    error = (given.double() - got.double()).masked_fill(given == -INF, 0).abs()
    assert (error <= step_bound(logprobs, bits).gather(1, order.indices)).all()


@given(
    st.integers(1, 40),
    st.integers(1, 500),
    st.integers(4, 16),
    st.floats(-30, 38),
    st.integers(0, 2**20),
)
def test_codec_is_the_reference_for_any_law(num_topk, spare, bits, size, seed):
    vocab_size = num_topk + spare - 1
    ids, logprobs, tail = laws_of(3, num_topk, vocab_size, seed=seed, size=10.0**size)
    options = {"vocab_size": vocab_size, "tail_logprob": tail, "bits": bits}
    codes = opk.encode_topk(ids, logprobs, **options)
    equal(codes.codes, reference.encode_topk(ids, logprobs, **options).codes)
    laws = opk.decode_topk(codes)
    equal_laws(laws, reference.decode_topk(codes))
    assert torch.equal(laws.logprobs == -INF, (laws.ids == -1) | (laws.logprobs == -INF))


@pytest.mark.parametrize("num_topk", [64, 128])
@pytest.mark.parametrize("width", [8.0, 15.0, 30.0])
def test_peaked_laws_lose_less_than_a_thousandth_of_a_nat(num_topk, width):
    logprobs = peaked(24, 151_936, width)
    # 200 bytes for 64 entries, 400 for 128
    for bits, limit in ((8, 1e-3), (10, 1e-5)):
        assert opk.topk_row_bytes(num_topk, 151_936, bits) <= 25 * num_topk // 8
        normalised, raw = kl_of_codes(logprobs, num_topk, bits)
        assert normalised.max() < limit
        # the mass of a decoded law is 1 only to first order in the steps
        assert raw.abs().max() < (3e-3 if bits == 10 else 1e-2)


def test_flat_laws_lose_even_less():
    logprobs = torch.log_softmax(torch.randn(16, 151_936), 1)
    normalised, raw = kl_of_codes(logprobs, 64, 8)
    assert normalised.max() < 1e-6 and raw.abs().max() < 1e-4
    assert entropy_of(logprobs).min() > 11
    uniform = torch.full((2, 1000), -math.log(1000.0))
    normalised, raw = kl_of_codes(uniform, 64, 4)
    assert normalised.abs().max() < 1e-7 and raw.abs().max() < 1e-6


def test_sizes_are_those_of_the_page():
    sizes = {(64, 8): 184, (64, 10): 200, (128, 8): 336, (128, 10): 368, (128, 12): 400}
    for (num_topk, bits), size in sizes.items():
        assert opk.topk_row_bytes(num_topk, 151_936, bits) == size


def test_tail_from_the_entries():
    _, logprobs, _ = laws_of(9, 12, 500, size=1e-2)
    logprobs = torch.log_softmax(torch.randn(9, 500), 1).sort(1, descending=True).values[:, :12]
    ids = torch.arange(12).expand(9, 12)
    laws = opk.decode_topk(opk.encode_topk(ids, logprobs, vocab_size=500))
    outside = 1 - logprobs.double().exp().sum(1)
    torch.testing.assert_close(laws.tail_logprob.double(), outside.log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        laws.tail_logprob,
        reference.topk_codec.tail_of(ids, logprobs, 500),
        rtol=1e-6,
        atol=1e-6,
    )
    whole = torch.tensor([[0.0, -INF]])
    laws = opk.decode_topk(opk.encode_topk(ids[:1, :2], whole, vocab_size=500))
    # one more id may have anything up to the rounding of float32
    assert laws.tail_logprob.item() == pytest.approx(math.log(torch.finfo(torch.float32).eps))
    laws = opk.decode_topk(opk.encode_topk(ids[:1, :2], whole, vocab_size=2))
    assert laws.tail_logprob.item() == -INF
    assert laws.ids.tolist() == [[0, 1]] and laws.logprobs.tolist() == [[0.0, -INF]]
    with pytest.raises(ValueError, match="row 0 is none: a log-prob is NaN"):
        opk.encode_topk(ids[:1, :2], torch.tensor([[-0.1, -0.1]]), vocab_size=500)


def test_no_rows_and_no_entries():
    codes = opk.encode_topk(torch.empty(0, 5, dtype=torch.int32), torch.empty(0, 5), vocab_size=9)
    laws = opk.decode_topk(codes)
    assert laws.ids.shape == laws.logprobs.shape == (0, 5) and laws.status.shape == (0,)
    ids, logprobs = torch.full((2, 5), -1), torch.full((2, 5), -INF)
    laws = opk.decode_topk(opk.encode_topk(ids, logprobs, vocab_size=9))
    assert torch.equal(laws.ids, ids.int()) and torch.equal(laws.logprobs, logprobs)
    assert laws.tail_logprob.tolist() == [0.0, 0.0]


def test_strides_and_dtypes_make_no_difference():
    ids, logprobs, tail = laws_of(6, 10, 300)
    logprobs = logprobs.to(torch.bfloat16).float()
    expected = opk.encode_topk(ids, logprobs, vocab_size=300, tail_logprob=tail)
    for dtype in (torch.float64, torch.bfloat16):
        wide = torch.zeros(6, 20, dtype=dtype)
        wide[:, ::2] = logprobs.to(dtype)
        strided = ids.long().t().contiguous().t()
        codes = opk.encode_topk(strided, wide[:, ::2], vocab_size=300, tail_logprob=tail.double())
        equal(codes.codes, expected.codes)
    rows = torch.zeros(6, 2 * expected.codes.shape[1], dtype=torch.uint8)
    rows[:, : expected.codes.shape[1]] = expected.codes
    strided = expected._replace(codes=rows[:, : expected.codes.shape[1]])
    equal_laws(opk.decode_topk(strided), opk.decode_topk(expected))
    some = expected._replace(codes=expected.codes[2:4])
    equal(opk.decode_topk(some).ids, opk.decode_topk(expected).ids[2:4])


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_make_no_difference(num_threads):
    ids, logprobs, tail = laws_of(37, 64, 5000)
    options = {"vocab_size": 5000, "tail_logprob": tail}
    one = opk.encode_topk(ids, logprobs, **options)
    torch.set_num_threads(num_threads)
    two = opk.encode_topk(ids, logprobs, **options)
    equal(one.codes, two.codes)
    equal_laws(opk.decode_topk(one), opk.decode_topk(two))


REFUSED = [
    ([3, 2, 1], [-1, NAN, -3], -1, "a log-prob is NaN"),
    ([3, 2, 1], [-1, -2, -3], NAN, "a log-prob is NaN"),
    ([3, 2, 1], [2.5, -2, -3], -1, "above 0: are these logits?"),
    ([3, 2, 1], [-1, -2, -3], 0.5, "above 0"),
    ([3, 50, 1], [-1, -2, -3], -1, "neither -1 nor in the vocabulary"),
    ([3, -100, 1], [-1, -2, -3], -1, "neither -1 nor in the vocabulary"),
    ([3, 2**32, 1], [-1, -2, -3], -1, "neither -1 nor in the vocabulary"),
    ([3, 2, -1], [-1, -2, -3], -1, "an id of -1 has a log-prob"),
    ([3, -1, 1], [-1, -INF, -INF], -1, "or an entry after it"),
    ([3, 2, 1], [-1, -3, -2], -1, "not best first"),
    ([3, 2, 3], [-1, -2, -3], -1, "an id is there twice"),
]


@pytest.mark.parametrize(("ids", "logprobs", "tail", "words"), REFUSED)
def test_rows_that_are_no_laws_are_refused_in_words(ids, logprobs, tail, words):
    good = torch.tensor([[3, 2, 1]]), torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([-1.0])
    given = torch.tensor([ids]), torch.tensor([logprobs]).float(), torch.tensor([tail]).float()
    ids, logprobs, tail = (torch.cat(pair) for pair in zip(good, given, strict=True))
    with pytest.raises(ValueError, match="row 1 is none") as error:
        opk.encode_topk(ids, logprobs, vocab_size=50, tail_logprob=tail)
    assert words in str(error.value)
    with pytest.raises(ValueError, match="row 1 has status"):
        reference.encode_topk(ids, logprobs, vocab_size=50, tail_logprob=tail)
    # the kernel marks the row, and leaves its neighbour alone
    ids = ids.clamp(-2, 99).int()
    codes, status = torch.ops.opd.topk_codec_encode(ids, logprobs, tail, 50, 8)
    assert status[0] == 0 and opk.codec_status(int(status[1])) != ""
    laws = opk.decode_topk(opk.TopkCodes(codes, 3, 50, 8))
    assert laws.status.tolist() == [0, 7]
    assert opk.codec_status(7) == "encode_topk has refused the row"
    assert laws.ids[0].tolist() == [3, 2, 1] and laws.ids[1].tolist() == [-1] * 3
    assert laws.logprobs[1].isnan().all() and laws.tail_logprob[1].isnan()


@pytest.mark.parametrize(
    "rounds", [60, pytest.param(2000, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize(("num_topk", "vocab_size", "bits"), [(5, 7, 8), (12, 900, 10), (3, 99, 4)])
def test_any_bytes_are_what_the_reference_makes_of_them(num_topk, vocab_size, bits, rounds):
    rng = random.Random(rounds)
    ids, logprobs, tail = laws_of(8, num_topk, vocab_size)
    good = opk.encode_topk(ids, logprobs, vocab_size=vocab_size, tail_logprob=tail, bits=bits)
    damaged = 0
    for number in range(rounds):
        rows = good.codes.clone()
        for row in rows:
            if number % 4 == 0:
                row.copy_(torch.tensor(list(rng.randbytes(len(row))), dtype=torch.uint8))
            for _ in range(rng.randrange(3)):
                row[rng.randrange(len(row))] ^= 1 << rng.randrange(8)
        codes = good._replace(codes=rows)
        laws = opk.decode_topk(codes)
        equal_laws(laws, reference.decode_topk(codes))
        damaged += int((laws.status != 0).sum())
        whole = laws.status == 0
        assert laws.logprobs[~whole].isnan().all() and (laws.ids[~whole] == -1).all()
        assert not laws.logprobs[whole].isnan().any()
        assert (laws.ids < vocab_size).all()
    assert damaged > rounds


def test_shapes_and_dtypes_are_refused_in_words():
    ids, logprobs, tail = laws_of(3, 4, 50)
    encode = opk.encode_topk
    for error, words, arguments, options in (
        (TypeError, "ids must be int64 or int32", (ids.float(), logprobs), {}),
        (TypeError, "logprobs must be float32", (ids, logprobs.int()), {}),
        (ValueError, "must have the shape", (ids, logprobs[:, :3]), {}),
        (ValueError, "have 2 dimension", (ids[0], logprobs[0]), {}),
        (ValueError, "tail_logprob must have 3 rows", (ids, logprobs), {"tail_logprob": tail[:2]}),
        (TypeError, "tail_logprob must be floating", (ids, logprobs), {"tail_logprob": tail.int()}),
        (ValueError, "vocab_size=3", (ids, logprobs), {"vocab_size": 3}),
        (
            ValueError,
            r"vocab_size must be in \[1, 2147483648\]",
            (ids, logprobs),
            {"vocab_size": 0},
        ),
        (TypeError, "vocab_size must be an int", (ids, logprobs), {"vocab_size": 50.0}),
        (ValueError, r"bits must be in \[4, 16\]", (ids, logprobs), {"bits": 17}),
        (TypeError, "bits must be an int", (ids, logprobs), {"bits": True}),
    ):
        with pytest.raises(error, match=words):
            encode(*arguments, **{"vocab_size": 50, **options})
    codes = encode(ids, logprobs, vocab_size=50)
    with pytest.raises(ValueError, match="must have 28 bytes per row"):
        opk.decode_topk(codes._replace(num_topk=8))
    with pytest.raises(TypeError, match="must be uint8"):
        opk.decode_topk(codes._replace(codes=codes.codes.int()))
    with pytest.raises(TypeError, match="must be a TopkCodes"):
        opk.decode_topk(codes.codes)
    with pytest.raises(opk.UnsupportedBackendError, match="it has no Triton kernel"):
        opk.decode_topk(codes, backend="triton")
    with pytest.raises(RuntimeError, match="rows of codes must have the bytes"):
        torch.ops.opd.topk_codec_decode(codes.codes, 8, 50, 10)
    with pytest.raises(RuntimeError, match="ids must be int32"):
        torch.ops.opd.topk_codec_encode(ids.long(), logprobs, tail, 50, 10)


def test_opcheck_and_compile():
    ids, logprobs, tail = laws_of(4, 6, 90)
    ids = ids.int()
    torch.library.opcheck(torch.ops.opd.topk_codec_encode, (ids, logprobs, tail, 90, 8))
    codes = opk.encode_topk(ids, logprobs, vocab_size=90, tail_logprob=tail, bits=8)
    torch.library.opcheck(torch.ops.opd.topk_codec_decode, (codes.codes, 6, 90, 8))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(ids, logprobs, tail):
        return opk.decode_topk(
            opk.encode_topk(ids, logprobs, vocab_size=90, tail_logprob=tail, bits=8)
        )

    equal_laws(there_and_back(ids, logprobs, tail), opk.decode_topk(codes))


def test_what_requires_grad_is_taken_and_has_none():
    ids, logprobs, tail = laws_of(4, 6, 90)
    codes = opk.encode_topk(ids, logprobs.requires_grad_(), vocab_size=90, tail_logprob=tail)
    assert not opk.decode_topk(codes).logprobs.requires_grad
