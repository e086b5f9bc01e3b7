# SPDX-License-Identifier: Apache-2.0
"""gradient_tolerance: the row ops against plain torch, every gradient within its certificate."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as multiprocessing

import opd_kernels as opk
from benchmarks import laws
from benchmarks.shapes import Shape
from tests.cases import BF16, F16, F32, F64, INF, NAN, SPECS, spec
from tests.checks import dtype_id, leaf
from tests.memory import peak_bytes

OPS = torch.ops.opd
TOLERANCE = 1e-4
PEAKED = Shape(48, 1500, 64, 96)


def gradient_of(num_tokens: int, vocab_size: int, dtype: torch.dtype) -> tuple:
    """(dZ of sizes from 1e-8 to 1, token weights of both signs with one of them 0)."""
    generator = torch.Generator().manual_seed(num_tokens)
    exponent = torch.rand(num_tokens, vocab_size, generator=generator, dtype=F64) * 8
    sign = torch.randn(num_tokens, vocab_size, generator=generator, dtype=F64).sign()
    weights = torch.linspace(-1.0, 2.0, num_tokens, dtype=F64)
    weights[num_tokens // 2] = 0.0
    # few columns have large entries
    exponent[:, ::3] += 4
    return (sign * 10**-exponent * weights.unsqueeze(1)).to(dtype), weights.to(dtype)


# -- the row ops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 1), (3, 17), (7, 513), (4, 9001)])
def test_sparse_gradient_ops_are_what_they_say(num_tokens, vocab_size, dtype, weighted):
    gradient, weights = gradient_of(num_tokens, vocab_size, dtype)
    weights = weights if weighted else torch.ones_like(weights)
    counts = weights != 0
    sizes = gradient.abs()
    kept = (sizes > TOLERANCE * weights.abs().unsqueeze(1))[counts].any(0)

    given = weights if weighted else None
    mark = OPS.sparse_gradient_mark(gradient, given, TOLERANCE)
    assert mark.dtype == torch.uint8
    assert torch.equal(mark.bool(), kept)
    columns = kept.nonzero().squeeze(1)
    packed = gradient.new_empty(num_tokens, len(columns))
    dropped = OPS.sparse_gradient_pack_(packed, gradient, given, columns, mark)
    expected = torch.where(counts.unsqueeze(1), gradient[:, kept], torch.zeros_like(packed))
    assert torch.equal(packed, expected)
    exact = sizes[:, ~kept].double().sum(1) / weights.double().abs()
    torch.testing.assert_close(
        dropped.double(), torch.where(counts, exact, torch.zeros_like(exact)), rtol=1e-7, atol=0
    )

    rows = torch.randn(len(columns), 5, dtype=dtype)
    target = torch.randn(vocab_size, 7, dtype=dtype)
    expected = target.clone()
    expected[columns, :5] += rows
    OPS.sparse_gradient_add_(target[:, :5], columns, rows)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_sparse_gradient_mark_needs_every_value_that_is_not_finite(value):
    gradient = torch.full((3, 40), 1e-9)
    gradient[1, 7] = value
    for weight in (1.0, 1e30, INF, NAN):
        weights = torch.tensor([1.0, weight, 1.0])
        assert OPS.sparse_gradient_mark(gradient, weights, 1e-3)[7] == 1
    weights = torch.tensor([1.0, 0.0, 1.0])
    assert OPS.sparse_gradient_mark(gradient, weights, 1e-3).sum() == 0


def test_sparse_gradient_dropped_is_added_up_in_float64():
    # a float32 sum would stop growing at 2**24 entries' worth of the first one
    gradient = torch.full((1, 200_000), 1e-7)
    gradient[0, 0] = 0.9
    kept = torch.zeros(200_000, dtype=torch.uint8)
    packed, columns = gradient.new_empty(1, 0), torch.empty(0, dtype=torch.int64)
    dropped = OPS.sparse_gradient_pack_(packed, gradient, None, columns, kept)
    assert dropped.item() == pytest.approx(gradient.double().sum().item(), rel=6e-8)


def test_sparse_gradient_ops_do_not_depend_on_the_number_of_threads():
    gradient, weights = gradient_of(31, 9001, F32)
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        mark = OPS.sparse_gradient_mark(gradient, weights, TOLERANCE)
        columns = mark.nonzero().squeeze(1)
        packed = gradient.new_empty(31, len(columns))
        dropped = OPS.sparse_gradient_pack_(packed, gradient, weights, columns, mark)
        target = torch.zeros(9001, 31)
        OPS.sparse_gradient_add_(target, columns, packed.t().contiguous())
        found.append((mark, packed, dropped, target))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sparse_gradient_opcheck():
    gradient, weights = gradient_of(4, 30, F32)
    mark = OPS.sparse_gradient_mark(gradient, weights, TOLERANCE)
    columns = mark.nonzero().squeeze(1)
    packed = gradient.new_empty(4, len(columns))
    torch.library.opcheck(OPS.sparse_gradient_mark, (gradient, weights, TOLERANCE))
    torch.library.opcheck(OPS.sparse_gradient_pack_, (packed, gradient, None, columns, mark))
    arguments = (torch.zeros(30, 6), columns, torch.randn(len(columns), 6))
    torch.library.opcheck(OPS.sparse_gradient_add_, arguments)


def test_sparse_gradient_ops_refuse_what_does_not_fit():
    gradient, _ = gradient_of(4, 30, F32)
    mark, none = torch.zeros(30, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    empty = gradient.new_empty(4, 0)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        OPS.sparse_gradient_mark(gradient.bfloat16(), None, 1e-3)
    with pytest.raises(RuntimeError, match="one value per token"):
        OPS.sparse_gradient_mark(gradient, torch.ones(5), 1e-3)
    with pytest.raises(RuntimeError, match="tolerance must be >= 0"):
        OPS.sparse_gradient_mark(gradient, None, NAN)
    with pytest.raises(RuntimeError, match="packed must be contiguous"):
        OPS.sparse_gradient_pack_(gradient, gradient, None, none, mark)
    with pytest.raises(RuntimeError, match="per-token"):
        OPS.sparse_gradient_pack_(empty, gradient, None, none, mark[:29])
    with pytest.raises(RuntimeError, match=r"must ascend in \[0, 30\), got 30"):
        OPS.sparse_gradient_pack_(
            empty.new_empty(4, 1), gradient, None, none.new_full((1,), 30), mark
        )


# -- the laws that it is measured on -------------------------------------------------------------


def test_peaked_laws_have_the_statistics_of_a_language_model():
    student, head, teacher, teacher_head = laws.peaked(Shape(512, 32_000, 512, 1024))
    logits, teacher_logits = student @ head.T, teacher @ teacher_head.T
    logprobs = torch.log_softmax(logits.double(), -1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    assert (entropy < 0.5).double().mean() == pytest.approx(0.8, abs=0.02)
    assert entropy.median() == pytest.approx(0.21, abs=0.05)
    assert entropy.mean() == pytest.approx(0.44, abs=0.05)
    assert (logits - teacher_logits).std() == pytest.approx(laws.TEACHER_NOISE, abs=0.02)
    gradient = logprobs.exp() - torch.softmax(teacher_logits.double(), -1)
    assert gradient.abs().sum(1).mean() == pytest.approx(0.11, abs=0.03)
    sizes = gradient.abs().amax(0)
    # 2.7, 3.0 and 3.6% of the columns in the study that this follows
    kept = [float((sizes > tolerance).double().mean()) for tolerance in (1e-3, 1e-4, 1e-5)]
    assert kept == pytest.approx([0.027, 0.036, 0.038], abs=0.004)


# -- the certificate -----------------------------------------------------------------------------


class Run:
    """Loss, gradients and statistics of one call."""

    def __init__(self, tensors, tolerance, *, upstream=1.0, dtype=None, **options):
        hidden, head, *teacher = (x if dtype is None else x.to(dtype) for x in tensors)
        self.hidden, self.head = leaf(hidden), leaf(head)
        self.leaves = {"hidden": self.hidden, "head": self.head}
        for name in ("student_bias",):
            if name in options:
                options[name] = self.leaves[name] = leaf(options[name])
        if "student_lora" in options:
            down, up, scaling = options["student_lora"]
            self.leaves |= {"down": leaf(down), "up": leaf(up)}
            options["student_lora"] = (self.leaves["down"], self.leaves["up"], scaling)
        self.out = opk.fused_linear_divergence(
            self.hidden, self.head, *teacher, gradient_tolerance=tolerance, **options
        )
        (self.out.loss * upstream).backward()

    @property
    def dropped(self):
        return self.out.statistics["gradient_dropped_l1"].double()

    def grads(self):
        return {name: leaf.grad.double() for name, leaf in self.leaves.items()}


def within_certificate(sparse: Run, exact: Run, weights=None, upstream=1.0, slack=None) -> dict:
    """Fails unless dX and dW are as close as promised; returns error / certificate.

    slack: of the arithmetic, as a multiple of the largest entry of a gradient.
    """
    weights = torch.ones_like(sparse.dropped) if weights is None else weights.double()
    lost = weights.abs() * sparse.dropped * upstream
    found, truth = sparse.grads(), exact.grads()
    head, hidden = exact.head.detach().double(), exact.hidden.detach().double()
    slack = slack if slack is not None else 1e-12
    ratios = {}
    for norm in (1, 2, INF):
        error = (found["hidden"] - truth["hidden"]).norm(norm, dim=1)
        bound = lost * head.norm(norm, dim=1).max()
        rounding = slack * truth["hidden"].norm(norm, dim=1).max()
        assert bool((error <= bound * (1 + 1e-6) + rounding).all()), (norm, error / bound)
        error_weight = (found["head"] - truth["head"]).norm(norm, dim=1).sum()
        bound_weight = (lost * torch.nan_to_num(hidden).norm(norm, dim=1)).sum()
        rounding = slack * truth["head"].norm(norm, dim=1).sum()
        assert error_weight <= bound_weight * (1 + 1e-6) + rounding, (norm, error_weight)
        ratios[norm] = (float((error / bound.clamp_min(1e-300)).max()), float(error_weight))
    return ratios


def flat_laws() -> laws.Laws:
    generator = torch.Generator().manual_seed(1)

    def normal(rows, columns, scale):
        return torch.randn(rows, columns, generator=generator, dtype=F64) * scale

    return laws.Laws(
        normal(16, 24, 1.0), normal(900, 24, 0.2), normal(16, 32, 1.0), normal(900, 32, 0.2)
    )


@pytest.mark.parametrize("law", ["peaked", "flat"])
@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_gradient_tolerance_keeps_every_divergence_within_the_certificate(divergence, law):
    tensors = laws.peaked(PEAKED, F64) if law == "peaked" else flat_laws()
    options = {"divergence": divergence.public()}
    exact = Run(tensors, None, **options)
    for tolerance in (1e-3, 1e-4, 1e-6):
        sparse = Run(tensors, tolerance, **options)
        assert torch.equal(sparse.out.loss, exact.out.loss)
        within_certificate(sparse, exact)
        # a row loses at most the tolerance in each column
        assert bool((sparse.dropped <= tolerance * tensors[1].shape[0]).all())
        if law == "peaked" and tolerance == 1e-4 and divergence.name == "reverse_kl":
            assert 0 < sparse.dropped.max() < 0.02


def test_gradient_tolerance_drops_exactly_what_it_says():
    tensors = laws.peaked(PEAKED, F64)
    student, head, teacher, teacher_head = tensors
    weights = torch.linspace(-1.0, 2.0, PEAKED.num_tokens, dtype=F64)
    sparse = Run(tensors, TOLERANCE, divergence="forward_kl", token_weights=weights)
    gradient = torch.softmax(student @ head.T, -1) - torch.softmax(teacher @ teacher_head.T, -1)
    kept = (gradient.abs() > TOLERANCE).any(0)
    assert 0.01 < kept.double().mean() < 0.4
    expected = gradient.abs()[:, ~kept].sum(1)
    torch.testing.assert_close(sparse.dropped, expected, rtol=1e-9, atol=1e-15)
    gradient = gradient * kept * weights.unsqueeze(1)
    found = sparse.grads()
    torch.testing.assert_close(found["hidden"], gradient @ head, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found["head"], gradient.T @ student, rtol=1e-9, atol=1e-14)
    assert bool((found["head"][~kept] == 0).all())


def test_gradient_tolerance_certificate_is_reached():
    # one token that loses one column, whose row of the head is the longest: an equality. The biases
    # make the laws; all but the first four columns have no mass
    head, bias, teacher_bias = torch.ones(64, 1, dtype=F64), *torch.full((2, 64), -80.0, dtype=F64)
    head[2] = 8.0
    bias[:4] = torch.tensor([0.0, 0.3, -20.0, 1.0])
    teacher_bias[:4] = torch.tensor([0.5, 0.3, -18.0, 0.2])
    one = torch.ones(1, 1, dtype=F64)
    tensors = (one, head, 2 * one, torch.zeros(64, 1, dtype=F64))
    options = {
        "divergence": "reverse_kl",
        "token_weights": torch.tensor([-3.0], dtype=F64),
        "student_bias": bias,
        "teacher_bias": teacher_bias,
    }
    sparse, exact = Run(tensors, 1e-3, **options), Run(tensors, None, **options)
    assert sparse.dropped.item() > 1e-6
    error = (sparse.hidden.grad - exact.hidden.grad).norm()
    torch.testing.assert_close(error, 3 * sparse.dropped[0] * 8, rtol=1e-9, atol=0)
    error = (sparse.head.grad - exact.head.grad).norm(dim=1).sum()
    bound = 3 * sparse.dropped[0]
    torch.testing.assert_close(error, bound, rtol=1e-9, atol=0)


# -- every way through the loops -----------------------------------------------------------------

WORKSPACES = {"one chunk": 1 << 30, "chunks": 1 << 19, "slices": 100_000}


@pytest.mark.parametrize("workspace", list(WORKSPACES))
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_tolerance_holds_in_chunks_and_slices(workspace, weighted):
    tensors = [x.clone() for x in laws.peaked(PEAKED, F64)]
    options = {"divergence": "jsd", "workspace_bytes": WORKSPACES[workspace]}
    plan = opk.explain("fused_linear_divergence", *tensors, workspace_bytes=WORKSPACES[workspace])
    assert ("path B" in plan) == (workspace == "slices"), plan
    weights = None
    if weighted:
        weights = options["token_weights"] = torch.linspace(-1, 1, PEAKED.num_tokens, dtype=F64)
        weights[5:9] = 0.0
        tensors[0][5:9], tensors[2][5:9] = NAN, NAN
    upstream = 0.25
    exact = Run(tensors, None, upstream=upstream, **options)
    sparse = Run(tensors, TOLERANCE, upstream=upstream, **options)
    assert sparse.dropped.max() > 0
    if weighted:
        assert bool((sparse.dropped[5:9] == 0).all())
        assert bool((sparse.hidden.grad[5:9] == 0).all())
    within_certificate(sparse, exact, weights, upstream)


@pytest.mark.parametrize("workspace", list(WORKSPACES))
def test_gradient_tolerance_that_nothing_is_below_drops_nothing(workspace):
    tensors = flat_laws()
    options = {"divergence": "jsd", "workspace_bytes": WORKSPACES[workspace]}
    sparse, exact = Run(tensors, 1e-30, **options), Run(tensors, None, **options)
    assert bool((sparse.dropped == 0).all())
    for name, gradient in sparse.grads().items():
        assert torch.equal(gradient, exact.grads()[name])


def test_gradient_tolerance_that_everything_is_below_drops_everything():
    tensors = flat_laws()
    sparse = Run(tensors, 10.0)
    student, head, *_ = tensors
    assert all(bool((gradient == 0).all()) for gradient in sparse.grads().values())
    out = opk.divergence(leaf(student @ head.T), tensors[2] @ tensors[3].T)
    assert sparse.dropped.shape == out.shape
    assert bool((sparse.dropped > 0.1).all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("workspace", list(WORKSPACES))
def test_gradient_tolerance_in_lower_precision(workspace, dtype):
    tensors = [x.to(dtype) for x in laws.peaked(PEAKED)]
    options = {"divergence": "reverse_kl", "workspace_bytes": WORKSPACES[workspace]}
    exact, baseline = Run(tensors, None, dtype=F64), Run(tensors, None, **options)
    sparse = Run(tensors, TOLERANCE, **options)
    assert sparse.dropped.max() > 0
    rounding = max(
        float((baseline.grads()[name] - truth).abs().max() / truth.abs().max())
        for name, truth in exact.grads().items()
    )
    within_certificate(sparse, exact, slack=2 * rounding)


def test_gradient_tolerance_with_bias_and_low_rank_head():
    # their gradients need no head: they take the whole dZ
    tensors = laws.peaked(PEAKED, F64)
    pair = torch.randn(4, 64, dtype=F64) / 8, torch.randn(1500, 4, dtype=F64) / 8, 0.5
    options = {"student_bias": torch.randn(1500, dtype=F64) / 4, "student_lora": pair}
    exact, sparse = Run(tensors, None, **options), Run(tensors, TOLERANCE, **options)
    assert sparse.dropped.max() > 0
    within_certificate(sparse, exact)
    for name in ("student_bias", "down", "up"):
        assert torch.equal(sparse.grads()[name], exact.grads()[name])


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_gradient_tolerance_with_frozen_sides(frozen):
    hidden, head, *teacher = laws.peaked(PEAKED, F64)
    whole = Run((hidden, head, *teacher), TOLERANCE)
    given = [
        hidden if frozen in ("hidden", "both") else leaf(hidden),
        head if frozen in ("head", "both") else leaf(head),
    ]
    out = opk.fused_linear_divergence(*given, *teacher, gradient_tolerance=TOLERANCE)
    dropped = out.statistics["gradient_dropped_l1"]
    assert not dropped.requires_grad
    if frozen == "both":
        # there is no gradient that could lose anything
        assert bool((dropped == 0).all())
        return
    out.loss.backward()
    assert torch.equal(dropped.double(), whole.dropped)
    for tensor, expected in zip(given, (whole.hidden, whole.head), strict=True):
        assert tensor.grad is None or torch.equal(tensor.grad, expected.grad)


@pytest.mark.parametrize("where", ["student_hidden", "teacher_hidden", "student_head"])
def test_gradient_tolerance_does_not_drop_nan(where):
    tensors = [x.clone() for x in laws.peaked(PEAKED, F64)]
    position = {"student_hidden": 0, "student_head": 1, "teacher_hidden": 2}[where]
    tensors[position][3, 2] = NAN
    exact, sparse = Run(tensors, None), Run(tensors, TOLERANCE)
    assert sparse.out.loss.isnan()
    for name, gradient in exact.grads().items():
        assert torch.equal(sparse.grads()[name].isnan(), gradient.isnan())


def test_gradient_tolerance_takes_no_memory_of_its_own():
    shape = Shape(96, 4000, 64, 96)
    tensors = laws.peaked(shape)
    workspace_bytes = 1 << 21

    def run(tolerance):
        hidden, head, *teacher = tensors
        given = leaf(hidden), leaf(head)
        return peak_bytes(
            lambda: opk.fused_linear_divergence(
                *given, *teacher, gradient_tolerance=tolerance, workspace_bytes=workspace_bytes
            )
        )

    gradients = 4 * 64 * (96 + 4000)
    # marks, their ids (8 bytes) and the index that nonzero makes of them, per column
    assert run(TOLERANCE) <= workspace_bytes + gradients + 20 * 4000
    assert run(TOLERANCE) <= run(None) + 20 * 4000


def test_gradient_tolerance_compiles_without_a_graph_break():
    tensors = laws.peaked(Shape(8, 300, 16, 24))

    def loss(hidden, head):
        out = opk.fused_linear_divergence(
            hidden, head, *tensors[2:], gradient_tolerance=TOLERANCE, statistics=("forward_kl",)
        )
        return out.loss + 0 * out.statistics["gradient_dropped_l1"].sum()

    torch._dynamo.reset()
    eager, compiled = ([leaf(x) for x in tensors[:2]] for _ in range(2))
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, compiled, strict=True))


# -- a shard of the vocabulary on each rank ------------------------------------------------------


def _rank(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2
    )
    hidden, head, teacher, teacher_head = laws.peaked(PEAKED, F64)
    shards = [x.chunk(2)[rank] for x in (head, teacher_head)]
    run = Run(
        (hidden, shards[0], teacher, shards[1]),
        TOLERANCE,
        process_group=torch.distributed.group.WORLD,
    )
    torch.save((run.grads(), run.dropped), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradient_tolerance_over_ranks(tmp_path):
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = Run(laws.peaked(PEAKED, F64), TOLERANCE)
    head = torch.cat([gradients["head"] for gradients, _ in saved])
    for gradients, dropped in saved:
        torch.testing.assert_close(dropped, alone.dropped, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(gradients["hidden"], alone.grads()["hidden"])
    torch.testing.assert_close(head, alone.grads()["head"])


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1e-4, NAN, INF])
def test_gradient_tolerance_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match="gradient_tolerance must be positive and finite, got"):
        opk.fused_linear_divergence(*flat_laws(), gradient_tolerance=value)


def test_gradient_tolerance_is_refused_where_it_could_not_say_what_it_dropped():
    with pytest.raises(ValueError, match="gradient_tolerance must be None with reduction='none'"):
        opk.fused_linear_divergence(*flat_laws(), gradient_tolerance=1e-4, reduction="none")
    with pytest.raises(ValueError, match="without process_group and gradient_tolerance"):
        opk.fused_linear_divergence(*flat_laws(), gradient_tolerance=1e-4, backend="reference")


def test_gradient_tolerance_of_no_tokens():
    tensors = [x[:0] if i % 2 == 0 else x for i, x in enumerate(flat_laws())]
    sparse = Run(tensors, TOLERANCE)
    assert sparse.dropped.shape == (0,)
    assert bool((sparse.grads()["head"] == 0).all())


def test_gradient_tolerance_of_a_sum_with_labels():
    tensors = laws.peaked(PEAKED, F64)
    options = {
        "divergence": [(0.5, "reverse_kl"), (0.5, spec("cross_entropy").public())],
        "labels": torch.arange(PEAKED.num_tokens),
    }
    exact, sparse = Run(tensors, None, **options), Run(tensors, TOLERANCE, **options)
    within_certificate(sparse, exact)
    # a label's column is needed
    assert bool((sparse.head.grad[: PEAKED.num_tokens] != 0).any(1).all())
