# SPDX-License-Identifier: Apache-2.0
"""opk.fused_linear_divergence on CPU: truth, chunking, memory, statistics, frozen sides, errors."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import divergences as D
from opd_kernels import reference
from tests.cases import BF16, F16, F32, F64, FUSED_CASES, NAN, SPECS, FusedCase, fused_of, spec
from tests.checks import check_fused_divergence, dtype_id, laws_of, leaf, workspace_for
from tests.golden import GOLDEN, PAIRS
from tests.memory import peak_bytes

# the row kernel, which holds all that a divergence is, has the long list in test_divergence.py
EVERY = [
    pytest.param(case, dtype, divergence, id=f"{case.name}-{dtype_id(dtype)}-{divergence}")
    for case in FUSED_CASES
    for dtype in case.dtypes
    for divergence in (SPECS if case.every_divergence else (spec("jsd", beta=0.1),))
]
# parts of these are constants of the gradient by definition
DETACHED = ("todi", "adaptive_kl", "concrete_score")
every_reduction = pytest.mark.parametrize("reduction", ["sum", "none"])
STATISTICS = (
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
)
SMALL = FusedCase("small", 23, 301, 16, 24, weights="some_zero")
WORKSPACE = 1 << 30


# -- truth ---------------------------------------------------------------------------------------


@every_reduction
@pytest.mark.parametrize(("case", "dtype", "divergence"), EVERY)
def test_fused_linear_divergence_matches_reference(case, dtype, divergence, reduction):
    check_fused_divergence(case, dtype, divergence, "cpu", reduction, WORKSPACE)


@every_reduction
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("name", ["tiny_odd", "odd", "padded"])
def test_fused_linear_divergence_matches_reference_in_small_chunks(name, dtype, reduction):
    (case,) = (case for case in FUSED_CASES if case.name == name)
    budget = workspace_for(case, 4)
    check_fused_divergence(case, dtype, spec("reverse_kl"), "cpu", reduction, budget)


@every_reduction
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("golden", list(GOLDEN), ids=str)
def test_fused_linear_divergence_has_the_golden_values_float64(golden, pair, reduction):
    # an identity head turns hidden states into logits
    teacher, student = (torch.tensor([row], dtype=F64).log() for row in PAIRS[pair])
    value, gradient = GOLDEN[golden][pair]
    eye = torch.eye(student.shape[1], dtype=F64)
    hidden = leaf(student)
    out = opk.fused_linear_divergence(
        hidden, eye, teacher, eye, divergence=golden.public(), reduction=reduction
    )
    out.loss.sum().backward()
    assert out.loss.item() == pytest.approx(value, abs=1e-8)
    assert hidden.grad[0].tolist() == pytest.approx(gradient, abs=1e-8)


@every_reduction
@pytest.mark.parametrize(
    "divergence",
    [s for s in SPECS if s.name not in DETACHED and not dict(s.params).get("detach_mixture")],
    ids=str,
)
def test_fused_linear_divergence_gradcheck_float64(divergence, reduction):
    case = FusedCase("gradcheck", 4, 7, 3, 5, std=0.7, weights="random", temperature=(1.2, 0.8))
    inputs = fused_of(case, F64)

    def loss(hidden, head):
        return opk.fused_linear_divergence(
            hidden,
            head,
            inputs.teacher_hidden,
            inputs.teacher_lm_head_weight,
            divergence=divergence.public(),
            reduction=reduction,
            workspace_bytes=workspace_for(case, 2),
            **inputs.keywords(),
        ).loss

    leaves = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_fused_linear_divergence_equals_divergence_of_the_logits():
    inputs = fused_of(SMALL, F64)
    fused = opk.fused_linear_divergence(
        *inputs.tensors(), divergence="jsd", reduction="none", **inputs.keywords()
    )
    logits = [
        inputs.student_hidden @ inputs.student_lm_head_weight.T,
        inputs.teacher_hidden @ inputs.teacher_lm_head_weight.T,
    ]
    plain = opk.divergence(*logits, divergence="jsd", **inputs.keywords())
    torch.testing.assert_close(fused.loss, plain, rtol=1e-12, atol=1e-14)


# -- chunks and memory ---------------------------------------------------------------------------


@every_reduction
@pytest.mark.parametrize("dtype", [F64, BF16], ids=dtype_id)
@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 1000])
def test_fused_linear_divergence_does_not_depend_on_the_workspace(chunk_tokens, dtype, reduction):
    inputs = fused_of(SMALL, dtype)

    def run(workspace_bytes):
        hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
        out = opk.fused_linear_divergence(
            hidden,
            head,
            inputs.teacher_hidden,
            inputs.teacher_lm_head_weight,
            divergence="jsd",
            reduction=reduction,
            statistics=STATISTICS,
            workspace_bytes=workspace_bytes,
            **inputs.keywords(),
        )
        out.loss.sum().backward()
        return out.loss, out.statistics["forward_kl"], hidden.grad, head.grad

    # only the order of sums inside a GEMM may differ; a logit of 8 carries its rounding of 8 eps
    # into the probability, and a 16-bit gradient may then round the other way
    for small, large in zip(run(workspace_for(SMALL, chunk_tokens)), run(WORKSPACE), strict=True):
        real = torch.promote_types(dtype, F32)
        relative = 32 * torch.finfo(real).eps + (large.dtype != real) * torch.finfo(dtype).eps
        bound = relative * large.detach().abs().max().item()
        torch.testing.assert_close(small, large, rtol=relative, atol=bound)


@every_reduction
@pytest.mark.parametrize("workspace_bytes", [1 << 20, 4 << 20])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_fused_linear_divergence_stays_within_its_workspace(dtype, workspace_bytes, reduction):
    case = FusedCase("memory", 512, 4000, 64, 96)
    inputs = fused_of(case, dtype)
    hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)

    def step():
        out = opk.fused_linear_divergence(
            hidden,
            head,
            inputs.teacher_hidden,
            inputs.teacher_lm_head_weight,
            reduction=reduction,
            workspace_bytes=workspace_bytes,
        )
        out.loss.sum().backward()

    step()
    hidden.grad = head.grad = None
    gradients = hidden.nbytes + head.nbytes
    if dtype != F32:
        # dW accumulates in float32 before it takes the head's dtype
        gradients += 4 * head.numel()
    peak = peak_bytes(step)
    assert peak <= workspace_bytes + 1.05 * gradients + (64 << 10), f"{peak} bytes"
    whole_logits = 4 * case.num_tokens * case.vocab_size
    assert peak < whole_logits


def test_fused_linear_divergence_frozen_head_allocates_no_head_gradient():
    case = FusedCase("frozen", 64, 8000, 64, 32)
    inputs = fused_of(case, F32)
    hidden = leaf(inputs.student_hidden)
    budget = workspace_for(case, 4)

    def step():
        opk.fused_linear_divergence(
            hidden, *inputs.tensors()[1:], workspace_bytes=budget
        ).loss.backward()

    step()
    assert peak_bytes(step) < budget + hidden.nbytes + (64 << 10)
    assert peak_bytes(step) < inputs.student_lm_head_weight.nbytes


# -- frozen sides and gradients ------------------------------------------------------------------


@every_reduction
@pytest.mark.parametrize("trained", ["hidden", "head", "both", "none"])
def test_fused_linear_divergence_gradients_of_what_is_trained_only(trained, reduction):
    inputs = fused_of(SMALL, F32)

    def run(with_hidden, with_head):
        hidden, head = inputs.student_hidden.clone(), inputs.student_lm_head_weight.clone()
        hidden.requires_grad_(with_hidden)
        head.requires_grad_(with_head)
        loss = opk.fused_linear_divergence(
            hidden, head, *inputs.tensors()[2:], reduction=reduction, **inputs.keywords()
        ).loss.sum()
        if with_hidden or with_head:
            loss.backward()
        return loss, hidden.grad, head.grad

    expected = run(True, True)
    loss, hidden_grad, head_grad = run(trained in ("hidden", "both"), trained in ("head", "both"))
    assert torch.equal(loss, expected[0])
    assert loss.requires_grad == (trained != "none")
    for got, full, wanted in (
        (hidden_grad, expected[1], trained in ("hidden", "both")),
        (head_grad, expected[2], trained in ("head", "both")),
    ):
        assert torch.equal(got, full) if wanted else got is None


@every_reduction
def test_fused_linear_divergence_gives_the_teacher_no_gradient(reduction):
    leaves = [leaf(x) for x in fused_of(SMALL, F32).tensors()]
    weights = fused_of(SMALL, F32).token_weights
    out = opk.fused_linear_divergence(*leaves, reduction=reduction, token_weights=weights)
    out.loss.sum().backward()
    assert leaves[2].grad is None and leaves[3].grad is None
    assert leaves[0].grad is not None and leaves[1].grad is not None


@every_reduction
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_fused_linear_divergence_backward_twice(dtype, reduction):
    inputs = fused_of(SMALL, dtype)
    hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    loss = opk.fused_linear_divergence(
        hidden, head, *inputs.tensors()[2:], reduction=reduction, **inputs.keywords()
    ).loss.sum()
    first = torch.autograd.grad(loss, (hidden, head), 0.5 * torch.ones(()), retain_graph=True)
    first = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, (hidden, head), 0.5 * torch.ones(()), retain_graph=True)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    last = torch.autograd.grad(loss, (hidden, head), torch.ones(()))
    for one, two in zip(first, last, strict=True):
        torch.testing.assert_close(one * 2, two)


@every_reduction
def test_fused_linear_divergence_keeps_its_precision_under_autocast(reduction):
    # autocast must not turn the op's float32 GEMMs into bfloat16 ones, forward or backward (H4)
    inputs = fused_of(SMALL, F32)

    def run(enabled):
        hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            loss = opk.fused_linear_divergence(
                hidden, head, *inputs.tensors()[2:], reduction=reduction, **inputs.keywords()
            ).loss.sum()
            loss.backward()
        return loss, hidden.grad, head.grad

    for one, two in zip(run(True), run(False), strict=True):
        assert torch.equal(one, two)


@every_reduction
def test_fused_linear_divergence_in_inference_mode(reduction):
    inputs = fused_of(SMALL, F32)
    leaves = [leaf(x) for x in inputs.tensors()]
    expected = opk.fused_linear_divergence(*leaves, reduction=reduction, **inputs.keywords()).loss
    with torch.inference_mode():
        loss = opk.fused_linear_divergence(*leaves, reduction=reduction, **inputs.keywords()).loss
    assert torch.equal(loss, expected)
    assert not loss.requires_grad


def test_fused_linear_divergence_two_losses_share_the_inputs():
    inputs = fused_of(SMALL, F64)
    hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    exact_hidden, exact_head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    rest = inputs.tensors()[2:]

    def total(function, hidden, head):
        first = function(hidden, head, *rest, divergence="forward_kl", **inputs.keywords())
        second = function(hidden, head, *rest, divergence="reverse_kl", **inputs.keywords())
        return 0.25 * first.loss + 3.0 * second.loss

    total(opk.fused_linear_divergence, hidden, head).backward()
    total(reference.fused_linear_divergence, exact_hidden, exact_head).backward()
    torch.testing.assert_close(hidden.grad, exact_hidden.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head.grad, exact_head.grad, rtol=1e-10, atol=1e-12)


def test_fused_linear_divergence_accumulates_over_micro_batches():
    inputs = fused_of(FusedCase("micro", 12, 50, 8, 8), F64)
    hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    opk.fused_linear_divergence(hidden, head, *inputs.tensors()[2:]).loss.backward()
    parts_head = leaf(inputs.student_lm_head_weight)
    for begin in range(0, 12, 5):
        rows = slice(begin, begin + 5)
        opk.fused_linear_divergence(
            inputs.student_hidden[rows],
            parts_head,
            inputs.teacher_hidden[rows],
            inputs.teacher_lm_head_weight,
        ).loss.backward()
    torch.testing.assert_close(parts_head.grad, head.grad, rtol=1e-12, atol=1e-14)


# -- weights and NaN -----------------------------------------------------------------------------


@every_reduction
def test_fused_linear_divergence_all_masked_is_exactly_zero(reduction):
    inputs = fused_of(FusedCase("masked", 5, 40, 8, 8, weights="all_zero"), F32)
    assert inputs.student_hidden.isnan().all()
    hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    out = opk.fused_linear_divergence(
        hidden,
        head,
        *inputs.tensors()[2:],
        reduction=reduction,
        statistics=STATISTICS,
        **inputs.keywords(),
    )
    out.loss.sum().backward()
    assert bool((out.loss == 0).all())
    assert bool((hidden.grad == 0).all()) and bool((head.grad == 0).all())
    assert all(bool((row == 0).all()) for row in out.statistics.values())


def test_fused_linear_divergence_weight_zero_wins_over_an_infinite_upstream_gradient():
    inputs = fused_of(SMALL, F32)
    hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    loss = opk.fused_linear_divergence(
        hidden, head, *inputs.tensors()[2:], reduction="none", **inputs.keywords()
    ).loss
    masked = inputs.token_weights == 0
    loss.backward(torch.where(masked, torch.inf, 1.0))
    assert bool((hidden.grad[masked] == 0).all())
    assert bool(head.grad.isfinite().all())


@every_reduction
def test_fused_linear_divergence_of_no_tokens(reduction):
    hidden = torch.empty(0, 8, requires_grad=True)
    head = torch.randn(40, 8, requires_grad=True)
    out = opk.fused_linear_divergence(
        hidden, head, torch.empty(0, 6), torch.randn(40, 6), reduction=reduction
    )
    out.loss.sum().backward()
    assert out.loss.shape == (() if reduction == "sum" else (0,))
    assert out.loss.sum().item() == 0.0
    assert hidden.grad.shape == (0, 8)
    assert bool((head.grad == 0).all())


@every_reduction
def test_fused_linear_divergence_nan_without_a_mask_shows(reduction):
    inputs = fused_of(FusedCase("nan", 5, 40, 8, 8), F32)
    hidden = inputs.student_hidden.clone()
    hidden[2, 1] = NAN
    out = opk.fused_linear_divergence(hidden, *inputs.tensors()[1:], reduction=reduction)
    expected = [False, False, True, False, False] if reduction == "none" else [True]
    assert out.loss.reshape(-1).isnan().tolist() == expected


# -- statistics ----------------------------------------------------------------------------------


@every_reduction
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("with_grad", [True, False])
def test_fused_linear_divergence_statistics_match_reference(dtype, with_grad, reduction):
    inputs = fused_of(FusedCase("statistics", 40, 500, 16, 24, weights="some_zero"), dtype)
    hidden = inputs.student_hidden.clone().requires_grad_(with_grad)
    keywords = {"reduction": reduction, "statistics": STATISTICS, **inputs.keywords()}
    out = opk.fused_linear_divergence(hidden, *inputs.tensors()[1:], divergence="jsd", **keywords)
    truth = reference.fused_linear_divergence(
        *inputs.tensors(), divergence="jsd", **keywords
    ).statistics
    bound = 1e-10 if dtype == F64 else 5e-6
    assert tuple(out.statistics) == STATISTICS
    for name in STATISTICS:
        value = out.statistics[name]
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), truth[name], rtol=bound, atol=bound, msg=name)


def test_fused_linear_divergence_without_statistics_returns_none_of_them():
    assert opk.fused_linear_divergence(*fused_of(FUSED_CASES[1], F32).tensors()).statistics == {}


# -- determinism and compile ---------------------------------------------------------------------


@every_reduction
def test_fused_linear_divergence_is_deterministic_between_runs(reduction):
    inputs = fused_of(SMALL, F32)
    results = []
    for _ in range(2):
        hidden, head = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
        loss = opk.fused_linear_divergence(
            hidden, head, *inputs.tensors()[2:], reduction=reduction, **inputs.keywords()
        ).loss
        loss.sum().backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@every_reduction
@pytest.mark.parametrize("weighted", [True, False])
def test_fused_linear_divergence_compiles_without_a_graph_break(weighted, reduction):
    inputs = fused_of(SMALL if weighted else FUSED_CASES[2], F32)

    def loss(hidden, head):
        return opk.fused_linear_divergence(
            hidden * 1.5,
            head,
            *inputs.tensors()[2:],
            divergence="jsd",
            reduction=reduction,
            statistics=("student_entropy",),
            **inputs.keywords(),
        ).loss.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    actual = leaf(inputs.student_hidden), leaf(inputs.student_lm_head_weight)
    (3.0 * loss(*expected)).backward()
    (3.0 * compiled(*actual)).backward()
    torch.testing.assert_close(actual[0].grad, expected[0].grad)
    torch.testing.assert_close(actual[1].grad, expected[1].grad)


@pytest.mark.parametrize("case", [SMALL, FUSED_CASES[2]], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_fused_linear_divergence_opcheck(dtype, case):
    inputs = fused_of(case, dtype)
    weights = inputs.token_weights
    real = torch.promote_types(dtype, F32)
    pair = torch.randn(2, case.student_hidden_size), torch.randn(case.vocab_size, 2)
    laws = laws_of(
        inputs.student_hidden,
        case.vocab_size,
        divergence=D.jsd(0.3),
        temperature=inputs.temperature,
        token_weights=None if weights is None else weights.to(real),
        biases=(torch.randn(case.vocab_size), None, None),
    )
    tensors = [*inputs.tensors(), None, None, *pair]
    trained = [leaf(x) if i in (0, 1, 6, 7) else x for i, x in enumerate(tensors)]
    live = laws._replace(student_bias=leaf(laws.student_bias))
    workspace, rest = 1 << 20, ("", 0.0, None, "cpu")
    torch.library.opcheck(
        torch.ops.opd.fused_linear_divergence_sum,
        (*trained, *live, workspace, [True] * 5, True, *rest),
    )
    torch.library.opcheck(
        torch.ops.opd.fused_linear_divergence_fwd,
        (*trained, *live, workspace, True, "", None, "cpu"),
    )
    torch.library.opcheck(
        torch.ops.opd.fused_linear_divergence_bwd,
        (torch.ones(case.num_tokens), *tensors, *laws, workspace, [True] * 5, "", None, "cpu"),
    )


# -- errors --------------------------------------------------------------------------------------


def _call(**changes):
    names = ("student_hidden", "student_lm_head_weight", "teacher_hidden", "teacher_lm_head_weight")
    tensors = (torch.randn(4, 8), torch.randn(20, 8), torch.randn(4, 6), torch.randn(20, 6))
    arguments = {**dict(zip(names, tensors, strict=True)), **changes}
    tensors = [arguments.pop(name) for name in names]
    return opk.fused_linear_divergence(*tensors, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": torch.zeros(2, 4, 8)}, ValueError, "Flatten batch and sequence"),
        ({"student_hidden": None}, TypeError, "student_hidden must be a tensor, got NoneType"),
        (
            {"student_lm_head_weight": torch.zeros(8, 20)},
            ValueError,
            r"student_lm_head_weight must have shape \(vocab_size, 8\).* One row is one token",
        ),
        (
            {"student_lm_head_weight": torch.zeros(20, 8).bfloat16()},
            TypeError,
            "student_lm_head_weight must have dtype torch.float32 like student_hidden",
        ),
        ({"teacher_hidden": torch.zeros(5, 6)}, ValueError, "teacher_hidden must have 4 rows"),
        ({"teacher_lm_head_weight": torch.zeros(24, 6)}, ValueError, "pass vocab_size=20"),
        (
            {
                "student_hidden": torch.zeros(4, 8).int(),
                "student_lm_head_weight": torch.zeros(20, 8).int(),
            },
            TypeError,
            "student_hidden must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        ({"reduction": "mean"}, ValueError, "reduction must be one of 'sum', 'none', got 'mean'"),
        ({"statistics": ("entropy",)}, ValueError, "statistics must be one of 'student_entropy'"),
        ({"statistics": "forward_kl"}, TypeError, "must be a sequence of names, got 'forward_kl'"),
        (
            {
                "student_hidden": torch.zeros(4, 0),
                "student_lm_head_weight": torch.zeros(20, 0),
            },
            ValueError,
            "student_hidden must have a hidden size of at least 1, got 0",
        ),
        ({"workspace_bytes": 10}, ValueError, "workspace_bytes must be at least .* got 10"),
        ({"workspace_bytes": 1e9}, TypeError, "workspace_bytes must be an int, got float"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must be in \[1, 20\], got 21"),
        ({"token_weights": torch.ones(5)}, ValueError, "token_weights must have 4 rows"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "backend 'cuda' was requested but"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_fused_linear_divergence_rejects_in_words(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        _call(**changes)
    assert str(raised.value).startswith("fused_linear_divergence: ")
