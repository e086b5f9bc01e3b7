# SPDX-License-Identifier: Apache-2.0
"""opk.sorted_l1: truth, pairs, scales, ties, edges, the library's sort, compile, errors."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _laws, _ranks, reference
from tests.cases import BF16, F16, F32, F64
from tests.checks import dtype_id, leaf, upstream
from tests.sorted_laws import assert_no_kinks, eager_sorted_l1
from tests.tolerance import assert_within_eager

INF, NAN = math.inf, math.nan
ROWS, STUDENT, TEACHER = 7, 211, 130


def options_of(name: str) -> dict:
    """Keywords of one option."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randperm(STUDENT, generator=generator), torch.randperm(TEACHER, generator=generator)
    pairs = {"pairs": (ids[0][:60], ids[1][:60].int())}
    per_row = torch.rand(ROWS, generator=generator) + 0.5
    return {
        "plain": {},
        "temperatures": {"temperature": (per_row, 1.7)},
        "softcap": {"student_softcap": 4.0, "teacher_softcap": 7.0, "teacher_logit_scale": 0.7},
        "scales": {"student_log_scales": -per_row, "teacher_log_scales": -per_row.flip(0)},
        "left_out": pairs,
        "pairs": pairs | {"pair_weight": 0.3, "rest_weight": 0.7, "beta": 0.2},
        "everything": pairs
        | {"pair_weight": 0.4, "student_log_scales": -per_row, "student_softcap": 5.0}
        | {"student_vocab_size": STUDENT - 3, "temperature": 1.3}
        | {"pairs": tuple(x[:60] for x in (torch.arange(200).flip(0), ids[1]))},
        "weights": {"token_weights": torch.tensor([1.0, 0.0, 2.0, -0.5, 0.0, 1e-3, 1.0])},
    }[name]


OPTIONS = (
    "plain",
    "temperatures",
    "softcap",
    "scales",
    "left_out",
    "pairs",
    "everything",
    "weights",
)


def logits_of(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, STUDENT), (ROWS, TEACHER))
    return tuple((2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes)


def run(function, student, teacher, dtype, options, **more):
    """Loss, gradient of the logits, gradient of the log-scales."""
    options = dict(options)
    leaves = [leaf(student, dtype)]
    if "student_log_scales" in options:
        leaves.append(leaf(options["student_log_scales"], torch.promote_types(dtype, F32)))
        options["student_log_scales"] = leaves[1]
    loss = function(leaves[0], teacher, **options, **more)
    grad_loss = upstream(len(student)).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad_loss)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("name", OPTIONS)
def test_sorted_l1_matches_reference(name, dtype):
    student, teacher = logits_of(dtype)
    options = options_of(name)
    assert_no_kinks(student, teacher, **options)
    truth = run(reference.sorted_l1, student, teacher, F64, options)
    baseline = run(eager_sorted_l1, student, teacher, dtype, options)
    actual = run(opk.sorted_l1, student, teacher, dtype, options, backend="cpu")
    assert actual[0].dtype == torch.promote_types(dtype, F32)
    assert actual[1].dtype == dtype
    for got, plain, exact, what in zip(
        actual, baseline, truth, ("loss", "logits", "log_scales"), strict=False
    ):
        assert_within_eager(got, plain, exact, f"{name} {dtype_id(dtype)} {what}")


@pytest.mark.parametrize("name", OPTIONS)
def test_the_librarys_sort_matches_the_kernel(name):
    """What a GPU runs, here on the CPU."""
    student, teacher = logits_of(F64)
    rows, options = _laws.rows_of("test", student), options_of(name)
    sizes = options.get("student_vocab_size", STUDENT), TEACHER
    names = ("softcap", "logit_scale", "log_scales")
    sides = [
        tuple(options.get(f"{side}_{key}") for side in ("student", "teacher")) for key in names
    ]
    ranks = _ranks.pack(
        rows,
        sizes,
        temperature=options.get("temperature", 1.0),
        token_weights=options.get("token_weights"),
        log_scales=sides[2],
        pairs=options.get("pairs"),
        pair_weight=options.get("pair_weight", 0.0),
        rest_weight=options.get("rest_weight", 1.0),
        beta=options.get("beta", 0.5),
        biases=(None, torch.linspace(-1, 1, TEACHER, dtype=F64)),
        softcaps=sides[0],
        logit_scales=tuple(scale or 1.0 for scale in sides[1]),
    )
    loss, grad, grad_scales = _ranks.compare(student, teacher, ranks)
    torch.testing.assert_close(
        loss, torch.ops.opd.sorted_l1_fwd(student, teacher, *ranks), rtol=1e-12, atol=1e-14
    )
    expected, expected_scales = torch.ops.opd.sorted_l1_bwd(student, teacher, *ranks)
    torch.testing.assert_close(grad, expected[:, : sizes[0]], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(grad_scales, expected_scales, rtol=1e-10, atol=1e-14)
    in_place = student.clone()
    torch.ops.opd.sorted_l1_grad_(in_place, teacher.clone(), *ranks)
    assert torch.equal(in_place, expected)


def test_known_values_and_what_the_loss_cannot_see():
    p, q = (torch.tensor([row], dtype=F64) for row in ([0.7, 0.2, 0.1], [0.1, 0.3, 0.6]))
    loss = opk.sorted_l1(q.log(), p.log())
    assert loss.item() == pytest.approx(0.2, abs=1e-15)
    # a permutation, and zeros that one vocabulary has more
    swapped = torch.tensor([[0.6, 0.0, 0.1, 0.0, 0.3]], dtype=F64)
    assert opk.sorted_l1(swapped.log(), q.log()).item() == pytest.approx(0.0, abs=1e-15)
    assert opk.sorted_l1(q.log(), swapped.log()).item() == pytest.approx(0.0, abs=1e-15)
    # point masses of one size agree, wherever they are; disjoint scales do not
    point = torch.tensor([[0.0, -INF, -INF]])
    assert opk.sorted_l1(point, point.flip(1)).item() == 0.0
    uniform = torch.zeros(1, 1000)
    assert opk.sorted_l1(uniform, point).item() == pytest.approx(2 * (1 - 1e-3), rel=1e-6)


@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
@pytest.mark.parametrize("options", [{}, {"pair_weight": 1.0}], ids=["ranks", "pairs"])
def test_logits_of_any_size_have_the_law_of_their_differences(options, dtype):
    near = torch.tensor([[0.0, 0.0, 0.0, -(2.0**34)], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    teacher = torch.tensor([[0.1, 0.0, 0.2, -0.5], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    if options:
        options = options | {"pairs": (torch.arange(2), torch.arange(2))}
    found = []
    # 2**57 and what is added to it have no bits for anything below
    for size in (0.0, 2.0**57):
        student = (near + size).requires_grad_()
        loss = opk.sorted_l1(student, teacher + 0.0, **options)
        (swapped,) = (opk.sorted_l1(teacher + 0.0, near + size, **options),)
        loss.sum().backward()
        found.append((loss.detach(), swapped, student.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)
    assert found[1][0][1].item() == pytest.approx(0.0, abs=1e-6)


def test_ties_have_no_gradient_and_ids_order_equal_probabilities():
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=F64, requires_grad=True)
    opk.sorted_l1(logits, torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=F64)).sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    # of the student's two equal ones the first is compared with the teacher's largest
    student = torch.tensor([[0.0, 0.0]], dtype=F64, requires_grad=True)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=F64)
    opk.sorted_l1(student, teacher).sum().backward()
    # q (s - sum s q), s = (-1, 1)
    torch.testing.assert_close(student.grad, torch.tensor([[-0.5, 0.5]], dtype=F64))


def test_pairs_of_one_vocabulary_are_the_divergence():
    """Every id paired with itself: JSD_beta of the laws, D3."""
    student, teacher = (torch.randn(5, 600, dtype=F64) * 3 for _ in range(2))
    ids = torch.arange(600)
    spec = opk.divergences.jsd(beta=0.3)
    expected = run(opk.divergence, student, teacher, F64, {"divergence": spec})
    options = {"pairs": (ids, ids), "pair_weight": 1.0, "beta": 0.3}
    for got, exact in zip(
        run(opk.sorted_l1, student, teacher, F64, options), expected, strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", ["cpu", "library"])
def test_special_values_stay_in_their_row(backend):
    student, teacher = logits_of(F32)
    student[1, 3], teacher[2, 5], student[3, :] = NAN, INF, -INF
    student[4, 100:], teacher[4, :20] = -INF, -INF
    student[5] = 0.0
    student[5, 7] = 300.0
    ids = torch.arange(30)
    options = {"pairs": (ids, ids), "pair_weight": 1.0}
    if backend == "cpu":
        loss, grad = run(opk.sorted_l1, student, teacher, F32, options)
    else:
        none, one = (None, None), (1.0, 1.0)
        ranks = _ranks.pack(
            _laws.rows_of("test", student),
            (STUDENT, TEACHER),
            temperature=1.0,
            token_weights=upstream(ROWS),
            log_scales=none,
            rest_weight=1.0,
            beta=0.5,
            biases=none,
            softcaps=none,
            logit_scales=one,
            **options,
        )
        loss, grad, _ = _ranks.compare(student, teacher, ranks)
    # rows 1 to 3 have no law
    for row in range(ROWS):
        is_lost = row in (1, 2, 3) and not (backend == "library" and upstream(ROWS)[row] == 0)
        assert bool(loss[row].isnan()) == is_lost
        weight = upstream(ROWS)[row]
        if weight != 0:
            assert bool(grad[row].isnan().all()) == is_lost


def test_rows_of_weight_zero_are_not_read():
    student, teacher = logits_of(F32)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    clean = run(opk.sorted_l1, student, teacher, F32, {"token_weights": weights})
    student[1], teacher[3] = NAN, NAN
    dirty = run(opk.sorted_l1, student, teacher, F32, {"token_weights": weights})
    for got, expected in zip(dirty, clean, strict=True):
        assert torch.equal(got, expected)
        assert bool((got[[1, 3]] == 0).all())


@pytest.mark.parametrize("shape", [(0, 5, 7), (1, 1, 1), (3, 1, 900), (2, 2049, 3)])
def test_odd_shapes(shape):
    num_rows, student_size, teacher_size = shape
    student, teacher = torch.randn(num_rows, student_size), torch.randn(num_rows, teacher_size)
    truth = run(reference.sorted_l1, student, teacher, F64, {})
    actual = run(opk.sorted_l1, student, teacher, F32, {})
    for got, plain, exact in zip(
        actual, run(eager_sorted_l1, student, teacher, F32, {}), truth, strict=True
    ):
        assert_within_eager(got, plain, exact, str(shape))


def test_results_do_not_depend_on_threads(monkeypatch):
    student, teacher = torch.randn(9, 5000), torch.randn(9, 7000)
    expected = run(opk.sorted_l1, student, teacher, F32, {})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        for got, exact in zip(run(opk.sorted_l1, student, teacher, F32, {}), expected, strict=True):
            assert torch.equal(got, exact)
    finally:
        torch.set_num_threads(before)


def test_opcheck_and_gradcheck():
    student, teacher = logits_of(F64)
    student, teacher, options = student[:2, :23], teacher[:2, :17], dict(options_of("everything"))
    ids = torch.arange(6)
    options |= {"student_vocab_size": 21, "pairs": (ids.flip(0), ids)}
    scales = options.pop("student_log_scales")[:2].to(F64).requires_grad_()
    student = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, scales: opk.sorted_l1(z, teacher, student_log_scales=scales, **options),
        (student, scales),
    )
    ranks = _ranks.pack(
        _laws.rows_of("test", student),
        (21, 17),
        temperature=1.0,
        token_weights=None,
        log_scales=(scales, None),
        pairs=options.get("pairs"),
        pair_weight=0.5,
        rest_weight=1.0,
        beta=0.5,
        biases=(None, None),
        softcaps=(None, None),
        logit_scales=(1.0, 1.0),
    )
    torch.library.opcheck(torch.ops.opd.sorted_l1_fwd, (student, teacher, *ranks))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in ranks]
    for op in (torch.ops.opd.sorted_l1_bwd, torch.ops.opd.sorted_l1_grad_):
        torch.library.opcheck(op, (student.detach().clone(), teacher.clone(), *detached))


def test_compiles_whole_and_has_no_second_derivative():
    student, teacher = logits_of(F32)
    ids = torch.arange(30)

    def loss(z):
        return opk.sorted_l1(z, teacher, pairs=(ids, ids), pair_weight=0.5).sum()

    leaves = [leaf(student), leaf(student)]
    loss(leaves[0]).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves[1]).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    z = leaf(student)
    (grad,) = torch.autograd.grad(loss(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("ids", [([0], [-1]), ([0, 0], [1, 2]), ([0, 1], [5, 5])])
def test_a_compiled_call_refuses_pairs_too(ids):
    student, teacher = logits_of(F32)
    pairs = tuple(map(torch.tensor, ids))
    compiled = torch.compile(lambda z: opk.sorted_l1(z, teacher, pairs=pairs), backend="eager")
    with pytest.raises(RuntimeError, match="pairs must hold every id of both vocabularies once"):
        compiled(student)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"beta": 1.0}, ValueError, "beta must be in"),
        ({"pair_weight": -1.0}, ValueError, "pair_weight must be at least 0"),
        ({"pairs": torch.arange(3)}, TypeError, "pairs must be"),
        ({"pairs": (torch.arange(3), torch.arange(2))}, ValueError, "teacher_ids of pairs"),
        ({"pairs": (torch.arange(3), torch.tensor([0, 1, 130]))}, ValueError, "teacher_ids"),
        ({"pairs": (torch.tensor([-1]), torch.tensor([0]))}, ValueError, "student_ids of pairs"),
        ({"pairs": (torch.tensor([4, 4]), torch.tensor([0, 1]))}, ValueError, "got 4 more often"),
        ({"pairs": (torch.tensor([0, 1]), torch.tensor([5, 5]))}, ValueError, "got 5 more often"),
        ({"pairs": (torch.ones(1), torch.tensor([0]))}, TypeError, "int64 or int32"),
        ({"student_log_scales": torch.ones(ROWS)}, ValueError, "at most 0"),
        ({"teacher_log_scales": torch.zeros(ROWS - 1)}, ValueError, "teacher_log_scales"),
        ({"student_vocab_size": 212}, ValueError, "vocab_size must be in"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"backend": "triton"}, opk.UnsupportedBackendError, "no Triton kernel"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "tensors are on cpu"),
    ],
)
def test_refusals(change, error, words):
    student, teacher = logits_of(F32)
    with pytest.raises(error, match=words):
        opk.sorted_l1(student, teacher, **change)
    with pytest.raises(ValueError, match="teacher_logits must have"):
        opk.sorted_l1(student, teacher[1:])
