# SPDX-License-Identifier: Apache-2.0
"""opk.topk_divergence on CPU: truth, golden values, tails, identities, hostile input, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opd_kernels as opk
from opd_kernels import _cells, reference
from opd_kernels import divergences as D
from tests.cases import BF16, F16, F32, F64, LIMIT_SPECS, SPECS
from tests.checks import dtype_id, leaf
from tests.golden import GOLDEN, PAIRS
from tests.sparse import (
    BY_NAME,
    LIMIT_PAIRS,
    MASSES,
    SPARSE_CASES,
    TAILS,
    check_topk_divergence,
    is_refused,
    logits_with_tail,
    sparse_of,
)
from tests.sparse import PAIRS as SPECS_AND_TAILS

INF, NAN = math.inf, math.nan
FEW = (("forward_kl", "bucket"), ("jsd", "bucket"), ("reverse_kl", "renormalize_both"))
FEW += (("forward_kl", "renormalize_teacher"), ("reverse_kl", "drop"))
EVERY = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype_id(dtype)}")
    for case in SPARSE_CASES
    for dtype in case.dtypes
]
# detached parts: a finite difference sees through them
SMOOTH = [
    (spec, tail)
    for spec, tail in SPECS_AND_TAILS
    if spec.name not in ("todi", "adaptive_kl", "concrete_score")
    and not dict(spec.params).get("detach_mixture")
]
# of f-divergences and of Renyi's the data processing inequality is known
PROCESSED = [
    spec for spec in SPECS if spec.name not in ("adaptive_kl", "alpha_beta", "concrete_score")
]
pair_id = lambda pair: "-".join(map(str, pair))  # noqa: E731


def spec_named(name: str):
    return next(spec for spec in SPECS if spec.name == name)


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_topk_divergence_matches_reference(case, dtype):
    pairs = SPECS_AND_TAILS if case.every_divergence else [(spec_named(n), t) for n, t in FEW]
    for spec, tail in pairs:
        if tail == "renormalize_both" and case.is_messy:
            # a row without ids has no law to renormalize, and its NaN is the reference's too
            continue
        check_topk_divergence(case, dtype, spec, tail, "cpu")


@pytest.mark.parametrize("pair", LIMIT_PAIRS, ids=pair_id)
def test_topk_divergence_limit_cases_match_reference(pair):
    check_topk_divergence(BY_NAME["bent"], F64, *pair, "cpu")
    check_topk_divergence(BY_NAME["given_tail"], F32, *pair, "cpu")


def supports(student, teacher, num_ids):
    """ids of each kind of support."""
    generator = torch.Generator().manual_seed(5)
    top = {"teacher": teacher.topk(num_ids).indices, "student": student.topk(num_ids).indices}
    drawn = torch.randint(student.shape[1], (len(student), num_ids), generator=generator)
    union = opk.topk_support(top["student"], top["teacher"], "union")
    return {**top, "union": union, "given": drawn}


@pytest.mark.parametrize("pair", SPECS_AND_TAILS + LIMIT_PAIRS, ids=pair_id)
def test_topk_divergence_gradient_of_every_support_is_autograds(pair):
    spec, tail = pair
    generator = torch.Generator().manual_seed(0)
    z, y = (2 * torch.randn(5, 61, generator=generator, dtype=F64) for _ in range(2))
    law = y.log_softmax(-1)
    for support, ids in supports(z, y, 7).items():
        logprobs = law.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -INF)
        results = []
        for function, divergence in (
            (opk.topk_divergence, spec.public()),
            (reference.topk_divergence, spec),
        ):
            student = leaf(z)
            loss = function(
                student,
                ids,
                logprobs,
                divergence=divergence,
                support=support,
                tail=tail,
                temperature=1.3,
                softcap=15.0,
            )
            loss.backward(torch.linspace(-1, 2, 5, dtype=F64))
            results.append((loss.detach(), student.grad))
        for got, expected in zip(*results, strict=True):
            scale = 1 + expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12 * scale)


@pytest.mark.parametrize("pair", SMOOTH, ids=pair_id)
def test_topk_divergence_gradcheck_float64(pair):
    spec, tail = pair
    generator = torch.Generator().manual_seed(1)
    z, y = (torch.randn(3, 9, generator=generator, dtype=F64) for _ in range(2))
    logprobs, ids = y.log_softmax(-1).topk(4)
    ids[1, 2], logprobs[1, 2] = -1, -INF

    def loss(student):
        options = {"divergence": spec.public(), "tail": tail, "temperature": 1.2, "softcap": 5.0}
        return opk.topk_divergence(student, ids, logprobs, **options)

    assert torch.autograd.gradcheck(loss, leaf(z), eps=1e-6, atol=1e-7, rtol=1e-6)


# -- what it must equal --------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_topk_divergence_golden_values(golden, pair):
    teacher, student = (torch.tensor([row], dtype=F64).log() for row in PAIRS[pair])
    value, gradient = GOLDEN[golden][pair]
    width = teacher.shape[1]
    # all ids; all but each one of them, whose mass is then the tail's
    for kept in (width, width - 1):
        for columns in itertools.combinations(range(width), kept):
            ids = torch.tensor([columns])
            z = leaf(student)
            loss = opk.topk_divergence(z, ids, teacher.gather(1, ids), divergence=golden.public())
            loss.backward()
            assert loss.item() == pytest.approx(value, abs=1e-8)
            assert z.grad[0].tolist() == pytest.approx(gradient, abs=1e-8)


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
@pytest.mark.parametrize("spec", SPECS + LIMIT_SPECS, ids=str)
def test_topk_divergence_of_all_ids_but_one_is_the_divergence(spec, dtype):
    generator = torch.Generator().manual_seed(2)
    z, y = (torch.randn(4, 50, generator=generator, dtype=F64) for _ in range(2))
    z, y = z.to(dtype), y.to(dtype)
    logprobs, ids = y.double().log_softmax(-1).topk(49)
    bound = {"rtol": 0, "atol": 1e-11} if dtype == F64 else {"rtol": 1e-6, "atol": 1e-6}
    sparse, dense = leaf(z), leaf(z)
    ours = opk.topk_divergence(sparse, ids, logprobs, divergence=spec.public())
    full = opk.divergence(dense, y, divergence=spec.public())
    ours.sum().backward()
    full.sum().backward()
    if dtype == F64:
        bound["atol"] *= 1 + full.abs().max().item()
    torch.testing.assert_close(ours, full, **bound)
    bound["atol"] *= 1 + dense.grad.abs().max().item()
    torch.testing.assert_close(sparse.grad, dense.grad, **bound)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_ids=st.integers(1, 29),
    std=st.floats(0.1, 6.0),
    given_ids=st.booleans(),
)
def test_topk_divergence_bucket_is_a_lower_bound(seed, num_ids, std, given_ids):
    generator = torch.Generator().manual_seed(seed)
    z, y = (std * torch.randn(2, 30, generator=generator, dtype=F64) for _ in range(2))
    law = y.log_softmax(-1)
    ids = law.topk(num_ids).indices
    if given_ids:
        ids = torch.randint(30, ids.shape, generator=generator)
    for spec in PROCESSED:
        part = opk.topk_divergence(z, ids, law.gather(1, ids), divergence=spec.public())
        full = opk.divergence(z, y, divergence=spec.public())
        assert bool((part >= -1e-12).all()), spec
        assert bool((part <= full * (1 + 1e-9) + 1e-12).all()), (spec, part, full)


def test_topk_divergence_bucket_forward_kl_pulls_to_a_student_shaped_tail():
    # the gradient is q - p~, p~ = p on the ids and p_tail q_v / q_tail off them
    data = sparse_of(BY_NAME["odd"], F64)
    z = leaf(data.student_logits)
    opk.topk_divergence(z, *data.tensors()[1:]).sum().backward()
    q = z.detach().softmax(-1)
    ids, cells = _cells.teacher_cells(
        data.teacher_ids, data.teacher_logprobs, None, None, q.shape[1], _cells.BUCKET, F64
    )
    inside = torch.zeros(len(q), q.shape[1] + 1, dtype=torch.bool)
    inside = inside.scatter(1, ids.masked_fill(ids < 0, q.shape[1]), True)[:, :-1]
    rest = q.masked_fill(inside, 0.0)
    target = cells[:, -1:].exp() * rest / rest.sum(-1, keepdim=True)
    target = torch.cat([target, torch.zeros_like(target[:, :1])], 1)
    at = ids.masked_fill(ids < 0, q.shape[1])
    target = target.scatter_add(1, at, cells[:, :-1].exp())[:, :-1]
    torch.testing.assert_close(z.grad, q - target, rtol=1e-11, atol=1e-14)


def test_topk_divergence_renormalize_both_leaves_the_rest_alone():
    data = sparse_of(BY_NAME["padded"], F32)
    z = leaf(data.student_logits)
    opk.topk_divergence(
        z, *data.tensors()[1:], tail="renormalize_both", vocab_size=data.vocab_size
    ).sum().backward()
    outside = torch.ones_like(z, dtype=torch.bool).scatter(1, data.teacher_ids, False)
    assert bool((z.grad[outside] == 0).all())
    assert bool((z.grad[~outside] != 0).all())
    # so that anything may stand there
    data.student_logits[outside] = NAN
    again = leaf(data.student_logits)
    opk.topk_divergence(
        again, *data.tensors()[1:], tail="renormalize_both", vocab_size=data.vocab_size
    ).sum().backward()
    assert torch.equal(again.grad, z.grad)


def test_topk_divergence_of_a_sum_is_the_sum():
    data = sparse_of(BY_NAME["odd"], F64)
    gate = torch.rand(len(data.student_logits), dtype=F64)
    gate[::3] = 0.0
    for tail in ("bucket", "drop"):
        parts = [(0.3, D.forward_kl()), (gate, D.jsd(beta=0.2))]
        whole = opk.topk_divergence(*data.tensors(), divergence=parts, tail=tail)
        first, second = (
            opk.topk_divergence(*data.tensors(), divergence=part, tail=tail) for _, part in parts
        )
        torch.testing.assert_close(whole, 0.3 * first + gate * second, rtol=1e-12, atol=1e-14)


# -- tails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
@pytest.mark.parametrize("mass", MASSES)
def test_topk_divergence_fwd_sums_the_tail_itself(mass, dtype):
    logits = logits_with_tail(mass, 5000, 40, dtype)
    law = logits.double().log_softmax(-1)
    ids = torch.arange(40).unsqueeze(0)
    logprobs, tail, lse, entropy = torch.ops.opd.topk_divergence_fwd(
        logits, ids, None, None, [1.0, 0.0, 1.0], 5000
    )
    exact_tail, exact_rest = law[0, 40:].logsumexp(0), law[0, :40].logsumexp(0)
    tolerance = 1e-4 if dtype == F32 else 1e-9
    # both the tail and what it leaves, which is 1 - tail: each to its own digits
    assert tail.exp().item() == pytest.approx(exact_tail.exp().item(), rel=tolerance)
    assert -torch.expm1(tail).item() == pytest.approx(exact_rest.exp().item(), rel=tolerance)
    assert lse.item() == pytest.approx(logits.double().logsumexp(-1).item(), abs=2e-6)
    torch.testing.assert_close(logprobs.double(), law[:, :40], rtol=2e-6, atol=2e-6)
    exact = -(law.exp() * law).sum().item()
    assert entropy.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
@pytest.mark.parametrize("spec", ["forward_kl", "jsd", "skew_reverse_kl", "squared_hellinger"])
def test_topk_divergence_at_extreme_tails(spec, dtype):
    # every pair of masses is one row: students by teachers
    pairs = list(itertools.product(MASSES, MASSES))
    student = torch.cat([logits_with_tail(mass, 700, 12, dtype) for mass, _ in pairs])
    teacher = torch.cat([logits_with_tail(mass, 700, 12, F64, seed=8) for _, mass in pairs])
    teacher = teacher.log_softmax(-1)[:, :12]
    ids = torch.arange(12).repeat(len(pairs), 1)
    tail = torch.tensor([mass for _, mass in pairs], dtype=F64).log()
    results = []
    for function in (opk.topk_divergence, reference.topk_divergence):
        z = leaf(student)
        loss = function(z, ids, teacher, tail_logprob=tail, divergence=spec)
        loss.sum().backward()
        results.append((loss.detach().double(), z.grad.double()))
    (loss, gradient), (exact, exact_gradient) = results
    eps = torch.finfo(dtype).eps
    # 1e-15: what the reference itself loses, which adds up p log(p / q)
    torch.testing.assert_close(loss, exact, rtol=32 * eps, atol=1e-15)
    # off the ids, entry by entry: what a tiny tail gets is not lost in what the ids get
    for row, (student_mass, teacher_mass) in enumerate(pairs):
        off, exact_off = gradient[row, 12:], exact_gradient[row, 12:]
        noise = 16 * eps * max(student_mass, teacher_mass)
        torch.testing.assert_close(off, exact_off, rtol=1e-4, atol=noise)


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
def test_topk_divergence_gives_a_vanished_tail_its_gradient(dtype):
    # the student's tail is exp(-140), which float32 does not have; the teacher's is 0.3
    row = torch.cat([torch.randn(8), torch.randn(92) - 140.0]).to(dtype).unsqueeze(0)
    ids = torch.arange(8).unsqueeze(0)
    logprobs = torch.full((1, 8), math.log(0.7 / 8))
    z, exact = leaf(row), leaf(row, F64)
    opk.topk_divergence(z, ids, logprobs).sum().backward()
    reference.topk_divergence(exact, ids, logprobs).sum().backward()
    assert z.grad[0, 8:].sum().item() == pytest.approx(-0.3, rel=1e-5)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_topk_divergence_keeps_the_digits_of_nearly_equal_laws():
    generator = torch.Generator().manual_seed(4)
    y = 2 * torch.randn(6, 3000, generator=generator, dtype=F64)
    for size in (1e-1, 1e-2, 1e-3):
        z = (y + size * torch.randn(y.shape, generator=generator, dtype=F64)).float()
        logprobs, ids = y.log_softmax(-1).topk(64)
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            keywords = {"divergence": divergence}
            ours = opk.topk_divergence(z, ids, logprobs.float(), **keywords)
            exact = reference.topk_divergence(z, ids, logprobs.float(), **keywords)
            torch.testing.assert_close(ours.double(), exact, rtol=2e-6 / size + 1e-5, atol=0)


# -- special rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
def test_topk_divergence_nan_stays_in_its_row(tail):
    data = sparse_of(BY_NAME["padded"], F32)
    logits, logprobs = data.student_logits[:, :300].clone(), data.teacher_logprobs.clone()
    logits[1, 250] = NAN
    logprobs[3, 2] = NAN
    out = opk.topk_divergence(logits, data.teacher_ids, logprobs, tail=tail)
    # column 250 is no id of this row, and its ratios are not of it
    reads_all = tail != "renormalize_both"
    assert out.isnan().tolist() == [i == 3 or (i == 1 and reads_all) for i in range(7)]


def test_topk_divergence_minus_infinity_in_the_student():
    logits = torch.randn(4, 50, dtype=F64)
    logits[:, ::3] = -INF
    logits[3] = -INF
    logits[3, 8] = 0.0
    logprobs, ids = torch.randn(4, 50, dtype=F64).log_softmax(-1).topk(7)
    for divergence, tail in itertools.product(("forward_kl", "jsd", "total_variation"), TAILS):
        a, b = leaf(logits), leaf(logits)
        keywords = {"divergence": divergence, "tail": tail}
        one = opk.topk_divergence(a, ids, logprobs, **keywords)
        two = reference.topk_divergence(b, ids, logprobs, **keywords)
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14, equal_nan=True)
        kept = two.isfinite()
        torch.where(kept, one, 0.0).sum().backward()
        torch.where(kept, two, 0.0).sum().backward()
        torch.testing.assert_close(a.grad[kept], b.grad[kept], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_topk_divergence_of_no_tokens(dtype):
    logits = torch.empty(0, 5, dtype=dtype, requires_grad=True)
    loss = opk.topk_divergence(logits, torch.empty(0, 2).long(), torch.empty(0, 2))
    loss.sum().backward()
    assert loss.shape == (0,) and logits.grad.shape == (0, 5)


def test_topk_divergence_strides_and_dtypes_of_the_teacher():
    z = torch.randn(6, 20)
    logprobs, ids = torch.randn(6, 20).log_softmax(-1).topk(4)
    expected = opk.topk_divergence(z, ids, logprobs)
    for arguments in (
        (z.t().contiguous().t(), ids, logprobs),
        (z, ids.int(), logprobs.double()),
        (z, ids.t().contiguous().t(), logprobs.t().contiguous().t()),
        (z, ids, leaf(logprobs)),
    ):
        got = opk.topk_divergence(*arguments)
        assert torch.equal(got, expected)
        assert not got.requires_grad


def test_topk_divergence_is_deterministic_across_threads_and_runs():
    data = sparse_of(BY_NAME["odd"], F32)
    results = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        z = leaf(data.student_logits)
        loss = opk.topk_divergence(z, *data.tensors()[1:], divergence="jsd")
        loss.sum().backward()
        results.append((loss.detach(), z.grad))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("tail", TAILS)
def test_topk_divergence_compiles_without_a_graph_break(tail):
    data = sparse_of(BY_NAME["padded"], F32)
    weights = torch.rand(7)

    def loss(logits):
        return opk.topk_divergence(
            logits * 1.5,
            *data.tensors()[1:],
            divergence=[(0.5, "forward_kl"), (0.5, "jsd")],
            tail=tail,
            token_weights=weights,
            vocab_size=300,
        ).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = leaf(data.student_logits), leaf(data.student_logits)
    loss(expected).backward()
    compiled(actual).backward()
    torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
def test_topk_divergence_opcheck(dtype):
    data = sparse_of(BY_NAME["odd"], dtype, 3)
    real = torch.promote_types(dtype, F32)
    logits, ids = data.student_logits, data.teacher_ids
    cells = (ids, data.teacher_logprobs, None, torch.ones(3), 1423, _cells.BUCKET, dtype == F64)
    torch.library.opcheck(torch.ops.opd.topk_divergence_cells, cells)
    ids, teacher = torch.ops.opd.topk_divergence_cells(*cells)
    law = (torch.randn(1423, dtype=real), torch.full((3,), 1.5, dtype=real), [0.5, 9.0, 1.0], 1423)
    torch.library.opcheck(torch.ops.opd.topk_divergence_fwd, (leaf(logits), ids, *law))
    logprobs, tail, lse, _ = torch.ops.opd.topk_divergence_fwd(logits, ids, *law)
    student = leaf(logprobs)
    drop = (teacher[:, :-1], student, None, None, [0], [0.0, 0.0])
    torch.library.opcheck(torch.ops.opd.topk_divergence_drop, drop)
    arguments = (logits, ids, torch.randn_like(logprobs), tail.to(real), lse, *law)
    torch.library.opcheck(torch.ops.opd.topk_divergence_bwd, arguments)
    if dtype in (F32, F64):
        torch.library.opcheck(torch.ops.opd.topk_divergence_bwd_, (*arguments, -1))


@pytest.mark.parametrize("numbers", [[1.0, 0.0, 0.7], [-0.5, 2.0, 0.7]], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
def test_topk_divergence_bwd_in_place_is_bwd(dtype, numbers):
    logits = torch.randn(5, 1200, dtype=dtype)
    ids = torch.stack([torch.randperm(1190)[:9] for _ in range(5)])
    ids[2, 3] = -1
    law = (torch.randn(1190, dtype=dtype), None, numbers, 1190)
    _, tail, lse, _ = torch.ops.opd.topk_divergence_fwd(logits, ids, *law)
    rest = torch.linspace(-1, 1, 5, dtype=dtype)
    arguments = (logits, ids, torch.randn(5, 9, dtype=dtype), rest, lse + tail, *law)
    gradient = torch.ops.opd.topk_divergence_bwd(*arguments)
    assert bool((gradient[:, 1190:] == 0).all())
    assert torch.ops.opd.topk_divergence_bwd_(*arguments, -1) is None
    assert torch.equal(logits, gradient)


def test_topk_divergence_has_no_second_derivative():
    z = leaf(torch.randn(2, 9))
    loss = opk.topk_divergence(z, torch.tensor([[1], [2]]), torch.full((2, 1), -1.0)).sum()
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        gradient.sum().backward()


# -- errors --------------------------------------------------------------------------------------


def _call(**changes):
    arguments = {
        "student_logits": torch.randn(4, 20),
        "teacher_ids": torch.arange(3).repeat(4, 1),
        "teacher_logprobs": torch.full((4, 3), -2.0),
    }
    arguments.update(changes)
    names = ("student_logits", "teacher_ids", "teacher_logprobs")
    tensors = [arguments.pop(name) for name in names]
    return opk.topk_divergence(*tensors, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_logits": torch.zeros(20)}, ValueError, "student_logits must have 2 dim"),
        ({"student_logits": torch.zeros(4, 20).int()}, TypeError, "student_logits must be float32"),
        ({"teacher_ids": torch.zeros(4, 3)}, TypeError, "teacher_ids must be int64 or int32"),
        ({"teacher_ids": torch.zeros(3).long()}, ValueError, "teacher_ids must have 2 dim"),
        ({"teacher_ids": torch.zeros(5, 3).long()}, ValueError, "teacher_ids must have 4 rows"),
        ({"teacher_ids": torch.zeros(4, 2).long()}, ValueError, "must have the shape of teacher"),
        (
            {"teacher_ids": torch.zeros(4, 0).long(), "teacher_logprobs": torch.zeros(4, 0)},
            ValueError,
            "teacher_ids must have 1 to 8192 columns",
        ),
        ({"teacher_ids": torch.full((4, 3), 20)}, ValueError, r"teacher_ids must be below 20, got"),
        ({"teacher_logprobs": torch.zeros(4, 3).long()}, TypeError, "must be a floating tensor"),
        (
            {"teacher_logprobs": torch.tensor([[3.0, 1.0, 7.0]] * 4)},
            ValueError,
            "must be log-probabilities, .* sum to at most 1, got .* to 1119.* at position 0",
        ),
        ({"teacher_logprobs": torch.full((4, 3), -0.5)}, ValueError, "must be log-probabilities"),
        ({"tail_logprob": torch.zeros(4)}, ValueError, "tail_logprob must be the log of what"),
        ({"tail_logprob": torch.zeros(4, 1)}, ValueError, "tail_logprob must have 1 dim"),
        ({"tail_logprob": torch.zeros(3)}, ValueError, "tail_logprob must have 4 rows"),
        ({"tail_logprob": torch.zeros(4).int()}, TypeError, "tail_logprob must be a floating"),
        ({"support": "top"}, ValueError, "support must be one of 'teacher', 'student', 'union'"),
        ({"tail": "none"}, ValueError, "tail must be one of 'bucket', 'renormalize_both'"),
        ({"divergence": "cross_entropy"}, ValueError, "forward_kl with tail='drop'"),
        ({"divergence": "renyi", "tail": "drop"}, ValueError, "must be a sum over entries"),
        (
            {"divergence": "reverse_kl", "tail": "renormalize_teacher"},
            ValueError,
            "Use tail='bucket' or 'renormalize_both'",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"token_weights": torch.ones(3)}, ValueError, "token_weights must have 4 rows"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must be in \[1, 20\], got 21"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "backend 'cuda' was requested but"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_topk_divergence_rejects_in_words(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        _call(**changes)
    assert str(raised.value).startswith("topk_divergence: ")


def test_topk_divergence_refuses_exactly_what_is_infinite_or_no_sum():
    for spec, tail in itertools.product(SPECS + LIMIT_SPECS, TAILS):
        if is_refused(spec, tail):
            with pytest.raises(ValueError, match="tail="):
                _call(divergence=spec.public(), tail=tail)
        else:
            assert bool(_call(divergence=spec.public(), tail=tail).isfinite().all()), (spec, tail)


@pytest.mark.parametrize(("vocab_size", "num_ids"), [(1, 300), (700, 8192), (600_000, 257)])
def test_topk_divergence_fwd_of_long_tables_with_repeats(vocab_size, num_ids):
    generator = torch.Generator().manual_seed(6)
    z = torch.randn(2, vocab_size, generator=generator, dtype=F64)
    ids = torch.randint(-2, vocab_size, (2, num_ids), generator=generator)
    law = (None, None, [1.0, 0.0, 1.0], vocab_size)
    logprobs, tail, *_ = torch.ops.opd.topk_divergence_fwd(z, ids, *law)
    once = ids.masked_fill(_cells.repeated(ids) | (ids < 0), -1)
    exact = z.log_softmax(-1)
    expected = exact.gather(1, once.clamp_min(0)).masked_fill(once < 0, -INF)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    for row in range(2):
        rest = exact[row].index_fill(0, once[row][once[row] >= 0], -INF).logsumexp(0)
        torch.testing.assert_close(tail[row], rest, rtol=1e-10, atol=1e-12)


def test_topk_divergence_row_kernels_refuse_too_many_ids():
    ids = torch.full((1, 8193), -1)
    with pytest.raises(RuntimeError, match=r"num_ids must be in \[1, 8192\], got 8193"):
        torch.ops.opd.topk_divergence_fwd(torch.zeros(1, 9), ids, None, None, [1.0, 0.0, 1.0], 9)
    with pytest.raises(
        RuntimeError, match=r"token_ids must be below 9, got 9 at position \(0, 1\)"
    ):
        table = torch.tensor([[1, 9]])
        torch.ops.opd.topk_divergence_fwd(torch.zeros(1, 9), table, None, None, [1.0, 0.0, 1.0], 9)
