# SPDX-License-Identifier: Apache-2.0
"""opk.speculative_verify on the CPU kernels: truth, cuts, hostile input, compile, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import opd_kernels as opk
from tests.cases import BF16, F16, F32, F64, INF, NAN
from tests.checks import dtype_id, leaf
from tests.verification import MODES, drafts_of, same

DTYPES = (F64, F32, BF16, F16)
THRESHOLD = {"mode": "threshold", "threshold": 1.0}
CUTS = (
    {},
    {"top_k": 20},
    {"top_p": 0.7, "student_top_p": 1.0},
    {"top_k": 30, "top_p": 0.8, "student_top_k": 0, "temperature": 0.7, "student_temperature": 1.3},
)


def on_cpu(*arguments, **keywords):
    return opk.speculative_verify(*arguments, backend="cpu", **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mode", MODES)
def test_speculative_verify_matches_reference(mode, dtype):
    # 700 is no multiple of a block
    drafts = drafts_of(24, 4, 700, dtype)
    num_draft = torch.arange(24) % 5
    exact = dtype == F64
    for at, cut in enumerate(CUTS):
        options = drafts.options(
            mode,
            num_draft=num_draft,
            num_topk=3,
            student_softcap=9.0,
            teacher_logit_scale=1.1,
            vocab_size=690 + 10 * (at % 2),
            with_acceptance=True,
            **cut,
        )
        tensors = (drafts.ids % 690, *drafts[1:3])
        got = on_cpu(*tensors, **options)
        truth = opk.speculative_verify(*tensors, backend="reference", **options)
        assert got.student_logprobs.dtype == torch.promote_types(dtype, F32)
        limit = 1e-11 if exact else 3e-6
        same(got, truth, rtol=limit, atol=limit, what=f"{mode} {cut}")
        if not cut:
            # every way that a sequence can go is among them
            assert got.num_accepted.unique().numel() > (2 if mode != "threshold" else 1)


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 512, 32_000])
def test_speculative_verify_of_any_vocabulary_matches_reference(vocab_size):
    drafts = drafts_of(3, 2, vocab_size, noise=1.0)
    for mode in ("rejection", "block"):
        options = drafts.options(mode, top_k=5, top_p=0.9, with_acceptance=True)
        truth = opk.speculative_verify(*drafts[:3], backend="reference", **options)
        same(on_cpu(*drafts[:3], **options), truth, rtol=1e-11, atol=1e-11, what=mode)


# -- cuts ----------------------------------------------------------------------------------------


def kept_by(logits: torch.Tensor, top_k: int, top_p: float) -> list[list[int]]:
    """The tokens of each row's law, from what the row kernel says of its smallest entry."""
    law = (None, None, [1.0, 0.0, 1.0], logits.shape[1])
    none = torch.full((len(logits),), -1)
    lse, floor, *_ = torch.ops.opd.speculative_verify_rows_fwd(logits, none, *law, top_k, top_p)
    pairs = zip(logits, floor, strict=True)
    kept = [(row >= least).nonzero().flatten().tolist() for row, least in pairs]
    for row, ids, value in zip(logits.double(), kept, lse, strict=True):
        assert float(value) == pytest.approx(float(row[ids].logsumexp(0)), rel=1e-6, abs=1e-6)
    return kept


def test_speculative_verify_cuts_by_hand():
    row = torch.tensor([[0.1, 0.4, 0.2, 0.1, 0.2]]).log()
    assert kept_by(row, 0, 1.0) == [[0, 1, 2, 3, 4]]
    assert kept_by(row, 1, 1.0) == [[1]]
    # what equals the last one that stays, stays
    assert kept_by(row, 2, 1.0) == kept_by(row, 3, 1.0) == [[1, 2, 4]]
    assert kept_by(row, 4, 1.0) == kept_by(row, 9, 1.0) == [[0, 1, 2, 3, 4]]
    assert kept_by(row, 0, 1e-300) == kept_by(row, 0, 0.39) == [[1]]
    assert kept_by(row, 0, 0.41) == kept_by(row, 0, 0.79) == [[1, 2, 4]]
    assert kept_by(row, 0, 0.81) == [[0, 1, 2, 3, 4]]
    # top_p counts what top_k has left as all there is: 0.4 of 0.8
    assert kept_by(row, 3, 0.49) == [[1]] and kept_by(row, 3, 0.51) == [[1, 2, 4]]


def test_speculative_verify_cuts_where_float32_has_gaps():
    # 8 is one step of float32 at 1e8: e^-8 each, of which there are as many as weigh 1
    logits = torch.full((1, 3000), 1e8 - 8)
    logits[0, 0] = 1e8
    for top_k in (0, 2999):
        assert kept_by(logits, top_k, 0.9) == [list(range(3000))]
    assert kept_by(logits, 0, 0.4) == kept_by(logits, 1, 0.9) == [[0]]


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
@pytest.mark.parametrize(
    "law",
    ["normal", "flat", "huge", "tied", "two_values", "near_one", "denormal", "masked", "sorted"],
)
def test_speculative_verify_cuts_exactly_where_sorting_does(law, dtype):
    # 12,000 entries: more than are sorted at a time, so that bins of bins are counted
    size = 12_000
    generator = torch.Generator().manual_seed(len(law))
    normal = torch.randn(2, size, generator=generator, dtype=F64)
    ends = torch.zeros(2, size, dtype=F64)
    ends[:, ::3] = 1.0
    logits = {
        "normal": normal * 4,
        "flat": normal * 1e-3,
        "huge": normal * 1e30,
        "tied": (normal * 2).round(),
        "two_values": ends,
        "near_one": 1 + normal * 1e-6,
        "denormal": normal * 1e-40,
        "masked": normal.where(normal > 1.0, -INF),
        "sorted": normal.sort(1).values,
    }[law].to(dtype)
    order = logits.argsort(dim=1, descending=True, stable=True)
    probability = logits.double().softmax(1).gather(1, order)
    for top_k in (1, 2, 23, 24, 400, 5000, 11_999):
        least = logits.gather(1, order[:, top_k - 1 : top_k])
        expected = [row.nonzero().flatten().tolist() for row in logits >= least]
        assert kept_by(logits, top_k, 1.0) == expected, top_k
    upto = probability.cumsum(1)
    for top_p in (0.013, 0.3, 0.77, 0.9931):
        # rounding moves a sum by no more than this
        slack = 1e-10 if dtype == F64 else 3e-6
        first = (upto < top_p - slack).sum(1).clamp(max=size - 1)
        last = (upto < top_p + slack).sum(1).clamp(max=size - 1)
        for row, kept in enumerate(kept_by(logits, 0, top_p)):
            ends = [logits[row, order[row, place[row]]] for place in (first, last)]
            fewest, most = (int((logits[row] >= end).sum()) for end in ends)
            assert fewest <= len(kept) <= most, (law, top_p, len(kept), fewest, most)


def test_speculative_verify_without_a_cut_keeps_all():
    logits = torch.randn(2, 600)
    law = (None, None, [1.0, 0.0, 1.0], 600)
    ids = torch.tensor([5, -1])
    for cut in ((0, 1.0), (600, 1.0), (10_000, 1.0)):
        lse, floor, logprobs, ranks, argmax, largest = torch.ops.opd.speculative_verify_rows_fwd(
            logits, ids, *law, *cut
        )
        assert floor.tolist() == [-INF, -INF]
        torch.testing.assert_close(lse, logits.double().logsumexp(1))
        assert ranks.tolist() == [int((logits[0] > logits[0, 5]).sum()), -1]
        assert math.isnan(logprobs[1]) and torch.equal(argmax.long(), logits.argmax(1))
        assert torch.equal(largest, logits.amax(1))


# -- hostile input -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, "nothing"])
@pytest.mark.parametrize("mode", MODES)
def test_speculative_verify_of_a_bad_law_ends_its_own_sequence(mode, bad):
    drafts = drafts_of(3, 3, 300, noise=0.0)
    # all of these are kept: equal models, and the best tokens
    ids = drafts.teacher[:, :-1].argmax(-1)
    options = drafts.options(mode)
    options |= {"threshold": 1e9} if mode == "threshold" else {}
    expected = on_cpu(ids, *drafts[1:3], **options)
    assert expected.num_accepted.tolist() == [3, 3, 3]
    sides = ["teacher"] + ["student"] * (mode in ("rejection", "block", "threshold"))
    for side in sides:
        for place in range(4 if side == "teacher" else 3):
            broken = [drafts.student.clone(), drafts.teacher.clone()]
            row = broken[side == "teacher"][1, place]
            row[200 if isinstance(bad, float) else slice(None)] = bad if bad != "nothing" else -INF
            got = on_cpu(ids, *broken, **options)
            assert got.next_token.tolist()[::2] == expected.next_token.tolist()[::2]
            assert got.next_token[1] == -1 and got.num_accepted[[0, 2]].tolist() == [3, 3]
            # block looks at the place that follows before it keeps a draft
            assert got.num_accepted[1] <= place and (
                mode == "block" or got.num_accepted[1] == place
            )
            assert bool(got.teacher_logprobs[1, got.num_accepted[1] :].isnan().all())
            same(
                opk.speculative_verify(ids, *broken, backend="reference", **options),
                got,
                rtol=1e-11,
                atol=1e-11,
                what=f"{mode} {side} {place}",
            )


def test_speculative_verify_does_not_read_what_comes_after():
    drafts = drafts_of(4, 3, 300)
    for mode in MODES:
        options = drafts.options(
            mode, num_draft=torch.tensor([1, 0, 2, 3]), uniforms=drafts.uniforms.clone()
        )
        expected = on_cpu(*drafts[:3], **options)
        ids, student, teacher = (value.clone() for value in drafts[:3])
        for row, last in enumerate((1, 0, 2, 3)):
            ids[row, last:], student[row, last:], teacher[row, last + 1 :] = -7, NAN, INF
            options["uniforms"][row, last:-1] = NAN
        for backend in ("cpu", "reference"):
            got = opk.speculative_verify(ids, student, teacher, backend=backend, **options)
            same(got, expected, rtol=1e-11, atol=1e-11, what=f"{mode} {backend}")
        if mode not in ("block", "threshold"):
            # nor after a refusal
            for row, last in enumerate(expected.num_accepted.tolist()):
                student[row, last + 1 :], teacher[row, last + 1 :] = NAN, NAN
            same(on_cpu(ids, student, teacher, **options), expected, what=mode)


def test_speculative_verify_of_impossible_drafts():
    # q(0) = 0 < p(0) keeps, q(1) > 0 = p(1) refuses, and so does 0 / 0
    student = torch.tensor([-INF, 1.0, -INF, 0.0]).expand(3, 1, 4)
    teacher = torch.tensor([1.0, -INF, -INF, 0.0]).expand(3, 2, 4)
    drafts = torch.tensor([[0], [1], [2]])
    for uniform in (0.0, 1 - 2.0**-53):
        for mode in ("rejection", "block"):
            uniforms = torch.full((3, 2), uniform, dtype=F64)
            got = on_cpu(drafts, student, teacher, uniforms=uniforms, mode=mode)
            assert got.num_accepted.tolist() == [1, 0, 0], mode
            assert got.student_logprobs[0, 0] == -INF
            # p > q only at token 0
            assert got.next_token[1:].tolist() == [0, 0]
    kept = on_cpu(drafts, student, teacher, uniforms=uniforms, mode="topk", num_topk=4)
    assert kept.num_accepted.tolist() == [1, 1, 1]
    assert kept.teacher_logprobs[1:, 0].tolist() == [-INF, -INF]


@pytest.mark.parametrize("mode", ["rejection", "block", "threshold"])
def test_speculative_verify_of_drafts_too_rare_for_float64(mode):
    # exp(-4500) is 0 in float64, but its ratio to e exp(-4500) is not, nor is its log
    teacher = torch.tensor([-4500.0, 0.0], dtype=F64).expand(2, 2, 2)
    student = torch.stack([teacher[0, :1] + torch.tensor([1.0, 0.0]), teacher[0, :1].flip(1)])
    uniforms = torch.tensor([[0.36, 0.0], [0.36, 0.0]], dtype=F64)
    options = {"uniforms": uniforms, "mode": mode}
    if mode == "threshold":
        options |= {"threshold": 1.0, "history": torch.ones(2, 1)}
    got = on_cpu(torch.tensor([[0], [0]]), student, teacher, **options)
    assert got.num_accepted.tolist() == [1, 0] and got.next_token.tolist() == [1, 1]
    assert got.student_logprobs.flatten().tolist() == [-4499.0, -4500.0]
    assert got.teacher_logprobs[0].tolist() == [-4500.0, 0.0] and got.teacher_logprobs[1, 0] == 0
    if mode == "threshold":
        assert got.divergence.flatten().tolist() == [0.0, 4500.0]
    truth = opk.speculative_verify(
        torch.tensor([[0], [0]]), student, teacher, backend="reference", **options
    )
    same(got, truth, rtol=1e-14, atol=1e-14, what=mode)


def test_speculative_verify_at_the_ends_of_uniforms():
    drafts = drafts_of(2, 3, 700)
    equal = (drafts.ids, drafts.teacher[:, :-1], drafts.teacher)
    for uniform in (0.0, 1 - 2.0**-53):
        uniforms = torch.full((2, 4), uniform, dtype=F64)
        for mode in ("rejection", "block"):
            got = on_cpu(*equal, uniforms=uniforms, mode=mode)
            assert got.num_accepted.tolist() == [3, 3]
            assert got.next_token.tolist() == [0 if uniform == 0 else 699] * 2
    # nothing without mass is drawn: the law is that of three tokens
    teacher = torch.full((2, 1, 1500), -INF)
    teacher[..., [3, 700, 1400]] = 0.0
    for uniform, token in ((0.0, 3), (0.5, 700), (1 - 2.0**-53, 1400)):
        uniforms = torch.full((2, 1), uniform, dtype=F64)
        got = on_cpu(
            torch.empty(2, 0, dtype=torch.long), None, teacher, uniforms=uniforms, mode="topk"
        )
        assert got.next_token.tolist() == [token] * 2


def test_speculative_verify_draws_from_the_teacher_where_rounding_leaves_no_residual():
    # in float32 both laws are the same; the coin of 1 - 2^-53 meets a ratio that rounds below it
    teacher = torch.zeros(1, 2, 2)
    student = torch.tensor([[[0.0, 1e-9]]])
    law = (None, None, [1.0, 0.0, 1.0], 2)
    rows = torch.ops.opd.speculative_verify_rows_fwd(
        teacher[0], torch.tensor([-1, -1]), *law, 0, 1.0
    )
    of_student = torch.ops.opd.speculative_verify_rows_fwd(
        student[0], torch.tensor([-1]), *law, 0, 1.0
    )
    one, first = torch.ones(1, dtype=F64), torch.tensor([0])
    mass, overlap, token, _, logprob = torch.ops.opd.speculative_verify_residual_fwd(
        teacher[0], teacher[0], first, first, rows[0], rows[1], rows[0], rows[1], one, one,
        0.7 * one, None, None, None, None, [1.0, 0.0, 1.0] * 2, 2, True,
    )  # fmt: skip
    assert of_student[0].isfinite() and mass.tolist() == [0.0] and overlap.tolist() == [1.0]
    assert token.tolist() == [1] and float(logprob) == pytest.approx(-math.log(2))


# -- modes ---------------------------------------------------------------------------------------


def test_speculative_verify_of_all_and_of_no_ranks():
    drafts = drafts_of(5, 4, 60)
    every = on_cpu(*drafts[:3], uniforms=drafts.uniforms, mode="topk", num_topk=60)
    assert every.num_accepted.tolist() == [4] * 5
    none = on_cpu(*drafts[:3], uniforms=drafts.uniforms, mode="topk", num_topk=0)
    assert none.num_accepted.tolist() == [0] * 5
    upto = drafts.teacher[:, 0].softmax(-1).cumsum(-1)
    expected = (upto <= drafts.uniforms[:, -1:]).sum(1)
    assert torch.equal(none.next_token.long(), expected)
    # more than there are is all of them, also of numbers that no kernel holds
    for backend, number in itertools.product(("cpu", "reference"), (61, 2**31, 2**40, 2**64)):
        options = {"uniforms": drafts.uniforms, "mode": "topk", "backend": backend}
        kept = opk.speculative_verify(*drafts[:3], num_topk=number, top_k=number, **options)
        same(kept, every, rtol=1e-12, atol=1e-12, what=f"{backend} {number}")
    # ranks are by id where logits are equal, and no law is needed of the student
    teacher = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).expand(1, 2, 4)
    for token, rank in enumerate((0, 1, 2, 3)):
        for num_topk in range(5):
            got = on_cpu(
                torch.tensor([[token]]), None, teacher, uniforms=torch.rand(1, 2), mode="topk",
                num_topk=num_topk,
            )  # fmt: skip
            assert bool(got.accepted) == (rank < num_topk)
            assert bool(got.student_logprobs.isnan().all())


def test_speculative_verify_by_thresholds():
    drafts = drafts_of(6, 5, 50, noise=1.0)
    tensors, uniforms = drafts[:3], drafts.uniforms

    def call(threshold: float, **options):
        return on_cpu(*tensors, uniforms=uniforms, mode="threshold", threshold=threshold, **options)

    assert call(math.inf).num_accepted.tolist() == [5] * 6
    # nothing is refused before the window is whole, and without history it is all of the drafts
    assert call(0.0).num_accepted.tolist() == [5] * 6
    history = torch.full((6, 2), NAN)
    assert call(0.0, history=history).num_accepted.tolist() == [2] * 6
    history[:, 1] = 1e-3
    assert call(0.0, history=history).num_accepted.tolist() == [1] * 6
    assert call(1e-9, history=history.flip(1)).num_accepted.tolist() == [2] * 6
    history[:, 0] = 1e-3
    assert call(1.0, history=history).num_accepted.tolist() == [0] * 6
    # nothing is above inf, but 0 times it is 0
    history[:, 0] = INF
    assert call(1e-9, history=history).num_accepted.tolist() == [1] * 6
    assert call(0.0, history=history).num_accepted.tolist() == [0] * 6
    # rounding is no divergence
    assert call(1.0, history=torch.full((6, 2), 1e-11)).num_accepted.tolist() == [0] * 6
    same_laws = torch.full((6, 1), 1e-11)
    equal = (tensors[0], tensors[2][:, :-1] + 0.37, tensors[2])
    for number, backend in itertools.product((0.0, 2.0), ("cpu", "reference")):
        for dtype in (F64, F32):
            kept = opk.speculative_verify(
                equal[0], *(value.to(dtype) for value in equal[1:]), uniforms=uniforms,
                mode="threshold", threshold=number, history=same_laws, backend=backend,
            )  # fmt: skip
            assert kept.num_accepted.tolist() == [5] * 6, (backend, dtype)
            assert not bool(kept.divergence.any())
    got = call(math.inf, history=history, top_k=3)
    p, q = tensors[2][:, :-1].log_softmax(-1), tensors[1].log_softmax(-1)
    torch.testing.assert_close(got.divergence, (p.exp() * (p - q)).sum(-1))
    tensors = (tensors[0], tensors[2][:, :-1], tensors[2])
    assert call(0.0).num_accepted.tolist() == [5] * 6


def test_speculative_verify_greedily():
    teacher = torch.tensor([[[0.0, 2.0, 2.0], [3.0, 0.0, 3.0], [0.0, 0.0, 1.0]]])
    for ids, kept, token in (([1, 0], 2, 2), ([2, 0], 0, 1), ([1, 2], 1, 0)):
        got = on_cpu(torch.tensor([ids]), None, teacher, mode="greedy", temperature=0.1, top_k=1)
        assert got.num_accepted.tolist() == [kept] and got.next_token.tolist() == [token]
        logprob = teacher[0].log_softmax(-1)[kept, token]
        torch.testing.assert_close(got.teacher_logprobs[0, kept], logprob)


# -- the op --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_speculative_verify_of_nothing(mode):
    for num_sequences, num_drafts in ((0, 0), (0, 3), (2, 0)):
        drafts = drafts_of(num_sequences, num_drafts, 40)
        options = drafts.options(mode, with_acceptance=True)
        for backend in ("cpu", "reference"):
            got = opk.speculative_verify(*drafts[:3], backend=backend, **options)
            assert got.teacher_logprobs.shape == (num_sequences, num_drafts + 1)
            assert got.accepted.shape == (num_sequences, num_drafts)
            assert bool((got.next_token >= 0).all()) and not bool(got.num_accepted.any())


@pytest.mark.parametrize("mode", MODES)
def test_speculative_verify_is_the_same_for_any_batch_threads_and_strides(mode):
    drafts = drafts_of(8, 4, 1100, F32)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(on_cpu(*drafts[:3], **drafts.options(mode, top_p=0.9)))
    same(*results, what="threads")
    wide = torch.full((8, 5, 1400), NAN)
    wide[..., :1100] = drafts.teacher
    strided = (drafts.ids.t().contiguous().t(), leaf(drafts.student), wide[..., :1100])
    got = on_cpu(*strided, **drafts.options(mode, top_p=0.9))
    same(got, results[0], what="strides")
    assert not any(value.requires_grad for value in got if value is not None)
    for num_sequences in range(1, 8):
        options = drafts.options(mode, top_p=0.9, uniforms=drafts.uniforms[:num_sequences])
        if mode == "threshold":
            options["history"] = options["history"][:num_sequences]
        part = on_cpu(*(value[:num_sequences] for value in drafts[:3]), **options)
        expected = [None if value is None else value[:num_sequences] for value in results[0]]
        same(part, type(part)(*expected), what=f"{num_sequences} sequences")


@pytest.mark.parametrize("mode", ["block", "threshold"])
def test_speculative_verify_compiles_without_a_graph_break(mode):
    drafts = drafts_of(3, 2, 60, F32)

    def call(student, teacher):
        got = opk.speculative_verify(
            drafts.ids, student * 1.5, teacher, **drafts.options(mode, with_acceptance=True)
        )
        return tuple(value for value in got if value is not None)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(*drafts[1:3]), call(*drafts[1:3]), strict=True):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


def test_speculative_verify_opcheck_and_explain():
    drafts = drafts_of(3, 2, 20, F32)
    law = (torch.randn(18), torch.tensor([1.5, 0.7, 1.0, 2.0, 1.0, 0.8]), [0.5, 9.0, 1.0], 18)
    rows = drafts.student.flatten(0, 1)
    # no NaN, which opcheck takes for another one
    ids, ops = torch.tensor([3, 5, 17, 7, 0, 1]), torch.ops.opd
    torch.library.opcheck(ops.speculative_verify_rows_fwd, (rows, ids, *law, 5, 0.9))
    lse, floor, *_ = ops.speculative_verify_rows_fwd(rows, ids, *law, 5, 0.9)
    places, ones = torch.tensor([0, 4, 4]), torch.ones(3, dtype=F64)
    residual = (
        rows, rows, places, places, lse, floor, lse, floor, ones, ones, ones / 2,
        law[0], law[0], law[1], law[1], law[2] * 2, 18, True,
    )  # fmt: skip
    torch.library.opcheck(ops.speculative_verify_residual_fwd, residual)
    decision = (drafts.uniforms, torch.tensor([2, 2, 2]), None, [0, 0], [1.0, 1.0])
    equal = (drafts.ids, drafts.teacher[:, :-1].contiguous(), drafts.teacher)
    for mode in ("block", "threshold"):
        arguments = (*equal, None, None, [1.0, 0.0, 1.0] * 2, 20, *decision)
        torch.library.opcheck(
            ops.speculative_verify_fwd, (*arguments, mode, 25, math.inf, mode == "block", "cpu")
        )
    assert "backend 'cpu'" in opk.explain("speculative_verify", *drafts[:3])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "best"}, ValueError, "mode must be one of"),
        ({"draft_token_ids": torch.zeros(2)}, ValueError, "draft_token_ids must have 2 dim"),
        ({"draft_token_ids": torch.zeros(2, 3)}, TypeError, "draft_token_ids must be int64 or"),
        ({"draft_token_ids": torch.full((2, 3), 20)}, ValueError, r"in \[0, 20\), got 20 at pos"),
        ({"draft_token_ids": torch.full((2, 3), -1)}, ValueError, r"in \[0, 20\), got -1 at pos"),
        ({"student_logits": None}, ValueError, "student_logits must be given in mode 'rejection'"),
        ({"student_logits": torch.zeros(2, 4, 20)}, ValueError, r"must have shape \(2, 3, ..\)"),
        ({"student_logits": torch.zeros(2, 3, 21)}, ValueError, "pass vocab_size=20"),
        ({"student_logits": torch.zeros(2, 3, 20).double()}, TypeError, "float64 must be used for"),
        ({"teacher_logits": torch.zeros(2, 3, 20)}, ValueError, "one place more than drafts"),
        ({"teacher_logits": torch.zeros(2, 4)}, ValueError, "teacher_logits must have 3 dim"),
        ({"uniforms": None}, ValueError, "uniforms must be given in mode 'rejection'"),
        ({"uniforms": torch.zeros(2, 3)}, ValueError, r"uniforms must have shape \(2, 4\)"),
        ({"uniforms": torch.zeros(2, 4).half()}, TypeError, "uniforms must be float32 or float64"),
        ({"uniforms": torch.ones(2, 4)}, ValueError, r"uniforms must be in \[0, 1\), got 1.0"),
        ({"uniforms": torch.full((2, 4), NAN)}, ValueError, r"uniforms must be in \[0, 1\), got n"),
        ({"uniforms": torch.full((2, 4), -1e-9)}, ValueError, r"must be in \[0, 1\), got -"),
        ({"num_draft": torch.tensor([1, 4])}, ValueError, "num_draft must be from 0 to 3, got 4"),
        ({"num_draft": torch.tensor([1])}, ValueError, "num_draft must have 2 rows"),
        ({"num_draft": torch.ones(2)}, TypeError, "num_draft must be int64 or int32"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": 1e-50}, ValueError, r"must be in \[1.18e-38, 8.51e\+37\] in size, as fl"),
        ({"student_temperature": 1e50}, ValueError, r"temperature must be in \[1.18e-38"),
        ({"teacher_softcap": 1e50}, ValueError, r"softcap must be in \[1.18e-38"),
        ({"student_softcap": 1e-50}, ValueError, r"softcap must be in \[1.18e-38"),
        ({"teacher_logit_scale": -1e-50}, ValueError, r"logit_scale must be in .* got -1e-50"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int"),
        ({"top_p": 0.0}, ValueError, "top_p must be positive"),
        ({"student_top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], got 1.1"),
        ({"num_topk": -1}, ValueError, "num_topk must be at least 0"),
        ({"threshold": 1.0}, ValueError, "threshold must be given in mode 'threshold' and only"),
        ({"mode": "threshold"}, ValueError, "threshold must be given in mode 'threshold'"),
        ({"mode": "threshold", "threshold": NAN}, ValueError, "must be at least 0, got nan"),
        ({"history": torch.zeros(2, 3)}, ValueError, "history must be None outside of mode"),
        ({**THRESHOLD, "history": torch.zeros(3, 3)}, ValueError, "history must have 2 rows"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must be in \[1, 20\], got 21"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_speculative_verify_rejects_in_words(changes, error, message):
    arguments = {
        "draft_token_ids": torch.zeros(2, 3, dtype=torch.long),
        "student_logits": torch.randn(2, 3, 20),
        "teacher_logits": torch.randn(2, 4, 20),
        "uniforms": torch.rand(2, 4),
        **changes,
    }
    with pytest.raises(error, match=message) as raised:
        opk.speculative_verify(**arguments)
    assert str(raised.value).startswith("speculative_verify: ")
