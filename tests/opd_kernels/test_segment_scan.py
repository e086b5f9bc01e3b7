# SPDX-License-Identifier: Apache-2.0
"""The segment_scan family on the CPU kernels: truth, methods, laws, edges, autograd, errors."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import opd_kernels as opk
from opd_kernels import reference
from tests.checks import dtype_id, leaf
from tests.segments import (
    F32,
    F64,
    PACKS,
    SCANS,
    SHORT,
    check,
    check_group_statistics,
    eager_reduce,
    eager_scan,
    offsets_of,
    pack,
    slices,
)

NAN, INF = float("nan"), float("inf")
BF16, F16 = torch.bfloat16, torch.float16
REDUCTIONS = ("sum", "mean", "max", "min")
FAMILY = ("segment_scan", "segment_reduce", "segment_broadcast", "group_statistics")
LAWS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def packs(draw, max_length: int = 12):
    lengths = draw(st.lists(st.integers(0, max_length), max_size=6))
    values = st.floats(-8, 8, width=32)
    numbers = draw(st.lists(values, min_size=sum(lengths), max_size=sum(lengths)))
    return torch.tensor(numbers, dtype=F64), offsets_of(lengths)


SCAN_OPTIONS = st.fixed_dictionaries(
    {
        "discount": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        "first_step": st.integers(0, 3),
        "num_steps": st.one_of(st.none(), st.integers(1, 9)),
        "stride": st.integers(1, 4),
        "direction": st.sampled_from(["suffix", "prefix"]),
    }
)


# -- truth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        pytest.param(dtype, lengths, id=f"{dtype_id(dtype)}-{name}")
        for dtype in (F32, F64, BF16)
        # one dtype is enough for the long packs
        for name, lengths in (PACKS if dtype == F32 else SHORT).items()
    ],
)
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_segment_scan_matches_reference(options, dtype, lengths):
    values, offsets = pack(lengths, dtype)
    check("segment_scan", eager_scan, values, offsets, "cpu", f"cpu {dtype}", **options)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=dtype_id)
def test_segment_reduce_matches_reference(dtype, reduction, weighted, lengths):
    values, offsets = pack(lengths, dtype)
    options = {"reduction": reduction}
    if weighted:
        options["token_weights"] = torch.rand(values.shape).where(torch.rand(values.shape) > 0.4, 0)
    check("segment_reduce", eager_reduce, values, offsets, "cpu", f"cpu {dtype}", **options)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_segment_broadcast_matches_reference(lengths):
    values, offsets = torch.randn(len(lengths)), offsets_of(lengths)

    def eager(values, offsets, num_tokens):
        return values.repeat_interleave(offsets.diff(), output_size=num_tokens)

    check("segment_broadcast", eager, values, offsets, "cpu", "cpu", num_tokens=sum(lengths))


@pytest.mark.parametrize("lengths", [PACKS["ragged"], PACKS["ones"], [], [0, 0], [130, 2, 300]])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("correction", [0, 1])
def test_group_statistics_match_reference(correction, masked, lengths):
    values, offsets = pack(lengths)
    mask = torch.rand(values.shape) > 0.4 if masked else None
    check_group_statistics(values, offsets, "cpu", "cpu", mask=mask, correction=correction)


def test_long_segments_and_many_segments():
    long = torch.randn(200_000)
    whole = opk.segment_scan(long, offsets_of([200_000]))
    exact = long.double().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(whole, exact.float(), rtol=1e-6, atol=1e-5)
    window = opk.segment_scan(long, offsets_of([200_000]), num_steps=70_000)
    torch.testing.assert_close(
        window[:130_000], (exact[:130_000] - exact[70_000:]).float(), rtol=1e-5, atol=1e-4
    )
    ones = offsets_of([1] * 200_000)
    assert torch.equal(opk.segment_scan(long, ones, discount=0.9), long)
    assert torch.equal(opk.segment_reduce(long, ones, reduction="mean"), long)
    assert torch.equal(opk.segment_broadcast(long, ones, num_tokens=200_000), long)
    assert torch.equal(opk.group_statistics(long, ones).mean, long)


@pytest.mark.parametrize("function", FAMILY)
def test_reference_has_the_signature_of_the_function(function):
    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.name != "backend"]

    assert parameters(getattr(reference, function)) == parameters(getattr(opk, function))


# -- what methods make of it -----------------------------------------------------------------------


def test_length_normalised_return_of_minillm():
    rewards, offsets = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3])
    returns = opk.segment_scan(rewards, offsets, discount=0.95)
    remaining = opk.segment_scan(torch.ones(3), offsets)
    torch.testing.assert_close(returns / remaining, torch.tensor([1.869167, 2.425, 3.0]))


def test_k_step_return_with_a_bootstrap():
    rewards, offsets = pack([7, 0, 3], F64)
    state_values = torch.randn(10, dtype=F64)
    steps, gamma = 3, 0.9
    got = opk.segment_scan(rewards, offsets, discount=gamma, num_steps=steps)
    got += opk.segment_scan(state_values, offsets, discount=gamma, first_step=steps, num_steps=1)
    for piece in slices(offsets):
        r, v = rewards[piece].tolist(), state_values[piece].tolist()
        for t in range(len(r)):
            expected = sum(gamma**k * r[t + k] for k in range(steps) if t + k < len(r))
            expected += gamma**steps * v[t + steps] if t + steps < len(r) else 0.0
            assert got[piece][t].item() == pytest.approx(expected, abs=1e-12)


def test_returns_every_k_steps_of_ketchup():
    taken, best = pack([8, 5], F64)[0], torch.randn(13, dtype=F64)
    offsets, steps = torch.tensor([0, 8, 13]), 3
    rewards = taken - opk.segment_scan(best, offsets, first_step=steps, num_steps=1)
    got = opk.segment_scan(rewards, offsets, stride=steps)
    for piece in slices(offsets):
        q, m = taken[piece].tolist(), best[piece].tolist()
        for t in range(len(q)):
            expected = sum(
                q[u] - (m[u + steps] if u + steps < len(q) else 0.0)
                for u in range(t, len(q), steps)
            )
            assert got[piece][t].item() == pytest.approx(expected, abs=1e-12)


def test_generalised_advantages():
    rewards, offsets = pack([6, 4], F64)
    baseline, gamma, lam = torch.randn(10, dtype=F64), 0.99, 0.95
    following = opk.segment_scan(baseline, offsets, discount=gamma, first_step=1, num_steps=1)
    got = opk.segment_scan(rewards + following - baseline, offsets, discount=gamma * lam)
    for piece in slices(offsets):
        r, v = rewards[piece].tolist(), baseline[piece].tolist()
        advantage = 0.0
        for t in reversed(range(len(r))):
            after = v[t + 1] if t + 1 < len(r) else 0.0
            advantage = r[t] + gamma * after - v[t] + gamma * lam * advantage
            assert got[piece][t].item() == pytest.approx(advantage, abs=1e-12)


def test_step_weights_of_sod():
    # d_k = mean |log q - log P| over a tool step; w_k = d_1 / d_k before the cap
    gaps, turns = torch.tensor([1.0, -1.0, 2.0, 0.5, 1.5]), torch.tensor([0, 2, 3, 5])
    divergence = opk.segment_reduce(gaps.abs(), turns, reduction="mean")
    weights = divergence[0] / divergence
    assert weights.tolist() == [1.0, 0.5, 1.0]
    per_token = opk.segment_broadcast(weights, turns, num_tokens=5)
    assert per_token.tolist() == [1.0, 1.0, 0.5, 1.0, 1.0]


def test_group_advantages():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 2.0, 2.0]), torch.tensor([0, 4, 5, 7])
    stats = opk.group_statistics(rewards, groups)
    assert stats.count.tolist() == [4, 1, 2]
    assert stats.mean.tolist() == [0.5, 5.0, 2.0]
    assert stats.std.tolist() == pytest.approx([(1 / 3) ** 0.5, 0.0, 0.0])
    assert stats.leave_one_out_mean.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3, 0, 2, 2])
    mean, std = (opk.segment_broadcast(x, groups, num_tokens=7) for x in (stats.mean, stats.std))
    grpo = (rewards - mean) / (std + 1e-6)
    assert bool(grpo.isfinite().all())
    assert grpo[4:].tolist() == [0.0, 0.0, 0.0]
    population = opk.group_statistics(rewards, groups, correction=0)
    assert population.std.tolist() == pytest.approx([0.5, 0.0, 0.0])


def test_group_statistics_of_members_that_do_not_count():
    # LUFFY's baseline is of the on-policy members; a rollout that failed has no reward at all
    rewards, groups = torch.tensor([1.0, NAN, 3.0, INF, 7.0]), torch.tensor([0, 3, 4, 5])
    mask = torch.tensor([True, False, True, False, True])
    stats = opk.group_statistics(rewards, groups, mask=mask)
    assert stats.count.tolist() == [2, 0, 1]
    assert stats.mean.tolist() == [2.0, 0.0, 7.0]
    assert stats.std.tolist() == pytest.approx([2**0.5, 0.0, 0.0])
    assert stats.leave_one_out_mean.tolist() == [3.0, 2.0, 1.0, 0.0, 0.0]


def test_the_compositions_of_the_documentation_run():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "minillm" in b)
    offsets, groups = torch.tensor([0, 3, 8]), torch.tensor([0, 5, 8])
    names = ("rewards", "state_values", "taken", "best", "kl")
    scope = {name: torch.rand(8) for name in names}
    scope |= {"opk": opk, "torch": torch, "N": 8, "K": 3, "g": 0.9, "loss_mask": torch.ones(8)}
    scope |= {"offsets": offsets, "turn_offsets": offsets, "groups": groups}
    exec(block, scope)
    for name in ("minillm", "k_step", "ketchup", "weights", "grpo", "rloo"):
        assert scope[name].shape == (8,) and bool(scope[name].isfinite().all())


# -- laws ------------------------------------------------------------------------------------------


@LAWS
@given(packs(), SCAN_OPTIONS)
def test_scan_is_the_definition(drawn, options):
    values, offsets = drawn
    got = opk.segment_scan(values, offsets, **options)
    truth = opk.segment_scan(values, offsets, backend="reference", **options)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


@LAWS
@given(packs(), SCAN_OPTIONS)
def test_scan_of_a_pack_is_that_of_its_segments_bit_by_bit(drawn, options):
    values, offsets = drawn
    values = values.float()
    got = opk.segment_scan(values, offsets, **options)
    for piece in slices(offsets):
        alone = opk.segment_scan(values[piece], offsets_of([piece.stop - piece.start]), **options)
        assert torch.equal(got[piece], alone)


@LAWS
@given(packs(), SCAN_OPTIONS)
def test_scan_is_the_transpose_of_the_other_direction(drawn, options):
    values, offsets = drawn
    other = torch.randn(values.shape, dtype=F64)
    back = {**options, "direction": "prefix" if options["direction"] == "suffix" else "suffix"}
    one = (opk.segment_scan(values, offsets, **options) * other).sum()
    two = (values * opk.segment_scan(other, offsets, **back)).sum()
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@LAWS
@given(packs(), st.sampled_from(REDUCTIONS))
def test_reduce_of_a_pack_is_that_of_its_segments_bit_by_bit(drawn, reduction):
    values, offsets = drawn
    values = values.float()
    got = opk.segment_reduce(values, offsets, reduction=reduction)
    for s, piece in enumerate(slices(offsets)):
        alone = opk.segment_reduce(
            values[piece], offsets_of([piece.stop - piece.start]), reduction=reduction
        )
        assert torch.equal(got[s : s + 1], alone)


@LAWS
@given(packs())
def test_sum_is_the_scan_at_the_first_token_and_the_transpose_of_broadcast(drawn):
    values, offsets = drawn
    sums = opk.segment_reduce(values, offsets)
    scan = opk.segment_scan(values, offsets)
    for s, piece in enumerate(slices(offsets)):
        expected = scan[piece.start] if piece.stop > piece.start else torch.zeros((), dtype=F64)
        torch.testing.assert_close(sums[s], expected)
    other = torch.randn(sums.shape, dtype=F64)
    spread = opk.segment_broadcast(other, offsets, num_tokens=values.shape[0])
    torch.testing.assert_close((spread * values).sum(), (other * sums).sum())


@LAWS
@given(packs())
def test_leave_one_out_and_own_value_make_the_mean(drawn):
    values, offsets = drawn
    stats = opk.group_statistics(values, offsets)
    for s, piece in enumerate(slices(offsets)):
        count = piece.stop - piece.start
        if count:
            total = values[piece] + (count - 1) * stats.leave_one_out_mean[piece]
            torch.testing.assert_close(
                total, stats.mean[s].expand(count) * count, rtol=1e-12, atol=1e-12
            )


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 40))
@LAWS
def test_equal_rewards_have_no_spread_at_all(value, count):
    for dtype in (F32, F64):
        values = torch.full((count,), value, dtype=dtype) / 3
        stats = opk.group_statistics(values, torch.tensor([0, count]))
        assert stats.std.item() == 0
        assert torch.equal(stats.mean, values[:1])
        if count > 1:
            assert torch.equal(stats.leave_one_out_mean, values)


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_scan_spreads_a_bad_value_only_to_those_that_sum_it(options, bad):
    values, offsets = pack([6, 30, 5])
    values[20] = bad
    got = opk.segment_scan(values, offsets, **options)
    truth = opk.segment_scan(values, offsets, backend="reference", **options)
    assert torch.equal(got.isfinite(), truth.isfinite())
    assert torch.equal(got.isnan(), truth.isnan())
    assert bool(got[:6].isfinite().all()) and bool(got[36:].isfinite().all())


def test_scan_keeps_an_infinity_whose_factor_underflows():
    values = torch.zeros(1500)
    values[-1] = INF
    offsets = torch.tensor([0, 1500])
    for options in ({}, {"num_steps": 1499}, {"first_step": 1400}):
        got = opk.segment_scan(values, offsets, discount=0.5, **options)
        assert got.isnan().sum() == 0
        assert got[1499 - 1450 if "first_step" in options else 1].item() == INF


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_keeps_nan_in_its_segment_and_does_not_read_weight_0(reduction):
    values, offsets = torch.tensor([1.0, NAN, 2.0, 3.0]), torch.tensor([0, 2, 4])
    got = opk.segment_reduce(values, offsets, reduction=reduction)
    assert got.isnan().tolist() == [True, False]
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    values = leaf(values)
    got = opk.segment_reduce(values, offsets, reduction=reduction, token_weights=weights)
    assert got[0].item() == 1.0
    got.sum().backward()
    assert bool(values.grad.isfinite().all())
    assert values.grad[1] == 0


def test_reduce_where_nothing_counts():
    values, offsets = leaf(torch.tensor([5.0, 6.0])), torch.tensor([0, 0, 2])
    weights = torch.zeros(2, dtype=torch.bool)
    expected = {"sum": 0.0, "mean": 0.0, "max": -INF, "min": INF}
    for reduction, value in expected.items():
        got = opk.segment_reduce(values, offsets, reduction=reduction, token_weights=weights)
        assert got.tolist() == [value, value]
        (grad,) = torch.autograd.grad(got.sum(), values)
        assert grad.tolist() == [0.0, 0.0]
    cancelling = torch.tensor([1.0, -1.0])
    got = opk.segment_reduce(values, offsets, reduction="mean", token_weights=cancelling)
    assert got.tolist() == [0.0, 0.0]


def test_group_statistics_with_nan():
    values, groups = torch.tensor([1.0, NAN, 3.0, 4.0, 6.0]), torch.tensor([0, 3, 5])
    stats = opk.group_statistics(values, groups)
    assert stats.mean.isnan().tolist() == [True, False]
    assert stats.std.isnan().tolist() == [True, False]
    assert stats.leave_one_out_mean.isnan().tolist() == [True, False, True, False, False]
    assert stats.leave_one_out_mean[1] == 2


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("num_segments", [0, 1, 3])
def test_no_tokens(dtype, num_segments):
    values = torch.empty(0, dtype=dtype, requires_grad=True)
    offsets = torch.zeros(num_segments + 1, dtype=torch.int64)
    real = torch.promote_types(dtype, F32)
    for options in ({}, {"num_steps": 3, "stride": 2}):
        out = opk.segment_scan(values, offsets, **options)
        assert out.shape == (0,) and out.dtype == real
        out.sum().backward()
    for reduction in REDUCTIONS:
        out = opk.segment_reduce(values, offsets, reduction=reduction)
        assert out.shape == (num_segments,) and out.dtype == real
        out.sum().backward()
    assert values.grad.shape == (0,)
    out = opk.segment_broadcast(torch.ones(num_segments, dtype=dtype), offsets, num_tokens=0)
    assert out.shape == (0,)
    stats = opk.group_statistics(values.detach(), offsets)
    assert [x.tolist() for x in stats] == [[0] * num_segments] * 3 + [[]]


def test_offsets_of_int32_and_inputs_with_strides():
    values, offsets = pack([4, 0, 9])
    weights = torch.rand(13)
    strided = torch.stack([values, values], 1)[:, 0]
    assert not strided.is_contiguous()
    spread = torch.stack([offsets, offsets], 1)[:, 1].int()
    for function, options in (
        (opk.segment_scan, {"discount": 0.9}),
        (opk.segment_reduce, {"token_weights": weights}),
    ):
        expected = function(values, offsets, **options)
        assert torch.equal(function(strided, spread, **options), expected)
    out = opk.segment_reduce(values, offsets, token_weights=torch.stack([weights] * 2, 1)[:, 0])
    assert torch.equal(out, opk.segment_reduce(values, offsets, token_weights=weights))
    got, expected = (opk.group_statistics(x, offsets) for x in (strided, values))
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_every_thread_count_gives_the_same_bits():
    values, offsets = pack([1000, 0, 1, 5000, 3] * 4)
    results = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        x = leaf(values)
        outputs = [
            opk.segment_scan(x, offsets, discount=0.99),
            opk.segment_scan(x, offsets, discount=0.99, num_steps=77, stride=2),
            opk.segment_reduce(x, offsets, reduction="mean"),
        ]
        sum(out.sum() for out in outputs).backward()
        results.append([*(out.detach() for out in outputs), x.grad])
        results[-1] += list(opk.group_statistics(values, offsets))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# -- autograd and compile --------------------------------------------------------------------------


@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_scan_gradients_of_first_and_second_order(options):
    values, offsets = pack([4, 0, 1, 6], F64)

    def run(x):
        return opk.segment_scan(x * x, offsets, **options)

    assert torch.autograd.gradcheck(run, (leaf(values),))
    assert torch.autograd.gradgradcheck(run, (leaf(values),))


@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_gradients_of_first_and_second_order(reduction, weighted):
    values, offsets = pack([4, 1, 6], F64)
    weights = torch.rand(11, dtype=F64) + 0.1 if weighted else None

    def run(x):
        return opk.segment_reduce(x * x, offsets, reduction=reduction, token_weights=weights)

    assert torch.autograd.gradcheck(run, (leaf(values),))
    assert torch.autograd.gradgradcheck(run, (leaf(values),))


def test_broadcast_gradients_of_first_and_second_order():
    offsets = offsets_of([4, 0, 1, 6])

    def run(x):
        return opk.segment_broadcast(x * x, offsets, num_tokens=11)

    values = leaf(torch.randn(4, dtype=F64))
    assert torch.autograd.gradcheck(run, (values,))
    assert torch.autograd.gradgradcheck(run, (values,))


def test_the_gradient_of_an_extreme_goes_to_the_first_that_attains_it():
    values = leaf(torch.tensor([1.0, 4.0, 4.0, 2.0, 2.0]))
    out = opk.segment_reduce(values, torch.tensor([0, 3, 3, 5]), reduction="max")
    out.backward(torch.tensor([1.0, 10.0, 100.0]))
    assert values.grad.tolist() == [0.0, 1.0, 0.0, 100.0, 0.0]


def test_compiles_without_a_graph_break():
    offsets = offsets_of([3, 0, 5])
    weights = torch.rand(8)

    def loss(values):
        returns = opk.segment_scan(values * 1.5, offsets, discount=0.9, num_steps=2)
        means = opk.segment_reduce(
            returns, offsets, reduction="mean", token_weights=weights
        ) + opk.segment_reduce(returns, offsets, reduction="max").clamp_min(-5.0)
        baseline = opk.group_statistics(values.detach(), offsets).leave_one_out_mean
        return (opk.segment_broadcast(means, offsets, num_tokens=8) * (returns - baseline)).sum()

    torch._dynamo.reset()
    values = torch.randn(8)
    expected, actual = leaf(values), leaf(values)
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    torch.testing.assert_close(actual.grad, expected.grad)


def test_compiles_once_for_packs_of_any_size():
    torch._dynamo.reset()

    def returns(values, offsets):
        scan = opk.segment_scan(values, offsets, discount=0.5)
        mean = opk.segment_reduce(values, offsets, reduction="mean")
        return scan + opk.segment_broadcast(mean, offsets, num_tokens=values.shape[0])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(returns, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([3, 2], [5, 4, 2], [30, 1, 7, 8]):
        values, offsets = pack(lengths)
        torch.testing.assert_close(compiled(values, offsets), returns(values, offsets))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
def test_opcheck(dtype):
    values, offsets = pack([3, 0, 5], dtype)
    weights = torch.rand(8, dtype=dtype)
    ops, whole = torch.ops.opd, (1 << 63) - 1
    for options in ((0.9, 0, whole, 1, False), (0.9, 1, 2, 2, True)):
        torch.library.opcheck(ops.segment_scan_fwd, (leaf(values), offsets, *options))
    for reduction in range(4):
        for w in (None, weights):
            torch.library.opcheck(ops.segment_scan_reduce, (leaf(values), w, offsets, reduction))
    for w in (None, weights):
        torch.library.opcheck(
            ops.segment_scan_broadcast, (leaf(torch.randn(3, dtype=dtype)), w, offsets, 8)
        )
    for mask in (None, torch.tensor([1, 0] * 4, dtype=torch.uint8)):
        torch.library.opcheck(ops.segment_scan_group_statistics, (values, mask, offsets, 1))


# -- errors ----------------------------------------------------------------------------------------


def _call(function: str, **changes):
    arguments = {"values": torch.randn(6), "offsets": torch.tensor([0, 2, 6])}
    if function == "segment_broadcast":
        arguments = {"values": torch.randn(2), "offsets": arguments["offsets"], "num_tokens": 6}
    arguments.update(changes)
    return getattr(opk, function)(arguments.pop("values"), arguments.pop("offsets"), **arguments)


@pytest.mark.parametrize("function", FAMILY)
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 6], "offsets must start at 0, got 1"),
        ([0, 7, 6], "offsets must not decrease, got 6 after 7 at position 2"),
        ([0, -1, 6], "offsets must not decrease, got -1 after 0 at position 1"),
        ([0, 2, 5], "offsets must end at 6, the number of tokens, got 5"),
        ([0, 2, 1 << 40], "offsets must end at 6, the number of tokens, got 1099511627776"),
    ],
)
def test_rejects_what_are_not_offsets(function, offsets, message):
    with pytest.raises(RuntimeError, match=message) as raised:
        _call(function, offsets=torch.tensor(offsets))
    assert str(raised.value).startswith(f"{function}: ")


@pytest.mark.parametrize("function", FAMILY)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": torch.zeros(2, 3)}, ValueError, "alues must have 1 dim.* Flatten"),
        ({"values": torch.zeros(6).int()}, TypeError, "alues must be float32, .*int32"),
        ({"values": [1.0]}, TypeError, "alues must be a tensor, got list"),
        ({"offsets": torch.zeros(3)}, TypeError, "offsets must be int64 or int32, got torch.float"),
        ({"offsets": torch.zeros(1, 3).long()}, ValueError, "offsets must have 1 dim"),
        ({"offsets": torch.zeros(0).long()}, ValueError, "offsets must hold at least one value"),
        ({"offsets": [0, 6]}, TypeError, "offsets must be a tensor, got list"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "backend 'cuda' was requested but"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_rejects_in_words(function, changes, error, message):
    with pytest.raises(error, match=message):
        _call(function, **changes)


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        ("segment_scan", {"discount": 1.5}, ValueError, r"discount must be in \[0, 1\], got 1.5"),
        ("segment_scan", {"discount": NAN}, ValueError, r"discount must be in \[0, 1\], got nan"),
        ("segment_scan", {"discount": "1"}, TypeError, "discount must be a number, got str"),
        ("segment_scan", {"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ("segment_scan", {"num_steps": 2.0}, TypeError, "num_steps must be an int, got float"),
        ("segment_scan", {"first_step": -1}, ValueError, "first_step must be at least 0, got -1"),
        ("segment_scan", {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ("segment_scan", {"direction": "up"}, ValueError, "direction must be one of 'suff"),
        ("segment_reduce", {"reduction": "std"}, ValueError, "reduction must be one of 'sum'"),
        ("segment_reduce", {"token_weights": torch.ones(5)}, ValueError, "must have 6 rows like v"),
        (
            "segment_reduce",
            {"token_weights": torch.ones(6, requires_grad=True)},
            ValueError,
            "token_weights must not require grad",
        ),
        ("segment_broadcast", {"num_tokens": -1}, ValueError, "num_tokens must be at least 0"),
        ("segment_broadcast", {"num_tokens": True}, TypeError, "num_tokens must be an int"),
        ("segment_broadcast", {"values": torch.ones(3)}, ValueError, "offsets must have 4 rows"),
        ("group_statistics", {"mask": torch.ones(6)}, TypeError, "mask must be bool, got torch.fl"),
        ("group_statistics", {"mask": torch.ones(5).bool()}, ValueError, "mask must have 6 rows"),
        ("group_statistics", {"correction": 2}, ValueError, "correction must be 0 or 1, got 2"),
        (
            "group_statistics",
            {"values": torch.zeros(6, requires_grad=True)},
            ValueError,
            r"values must not require grad.*detach\(\)",
        ),
    ],
)
def test_rejects_its_own_options_in_words(function, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        _call(function, **changes)
    assert str(raised.value).startswith(f"{function}: ")


def test_explain_says_which_backend():
    values, offsets = pack([3, 2])
    text = opk.explain("segment_scan", values, offsets)
    assert text.startswith("segment_scan: backend 'cpu' for torch.float32 on cpu")
