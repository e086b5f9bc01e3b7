# SPDX-License-Identifier: Apache-2.0
"""The loops as a GPU runs them, on the CPU: 16-bit GEMMs and dZ, parts of chunks, split dX.

The row kernels are Triton's under its interpreter, and the cuts are those of a GPU at small sizes.
"""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _gemms, _linear, gemm, reference, sparse_gradient
from tests import eager
from tests.cases import BF16, F16, F32, FusedCase, fused_of, spec, token_ids_of
from tests.checks import check_fused_divergence, check_token_logprobs, dtype_id, leaf
from tests.gpu_paths import cut_as_on_a_gpu, recorded_plans, with_rounded_gradient
from tests.options import LAW_OPTIONS, law_options_of
from tests.tolerance import assert_within_eager

CASE = FusedCase("gpu", 21, 301, 16, 24, weights="some_zero")
ONE_CHUNK, SEVERAL = 1 << 20, 20_000
every_reduction = pytest.mark.parametrize("reduction", ["sum", "none"])
every_width = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
every_half = pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, interpreted_triton):
    cut_as_on_a_gpu(monkeypatch)


@pytest.fixture
def plans(monkeypatch):
    return recorded_plans(monkeypatch)


@pytest.fixture
def eager_rounds_grad_logits(monkeypatch):
    """Eager torch with float32 logits whose gradient is rounded to the head's width."""
    logits_of = eager._logits
    monkeypatch.setattr(
        eager,
        "_logits",
        lambda hidden, *rest: with_rounded_gradient(logits_of(hidden, *rest), hidden.dtype),
    )


# -- truth ---------------------------------------------------------------------------------------


@every_reduction
@every_width
@pytest.mark.parametrize("workspace_bytes", [ONE_CHUNK, SEVERAL])
def test_fused_linear_divergence_matches_reference(plans, workspace_bytes, dtype, reduction):
    check_fused_divergence(CASE, dtype, spec("jsd"), "triton", reduction, workspace_bytes)
    for plan in plans:
        assert plan.grad_hidden_splits > 1
        if workspace_bytes == SEVERAL:
            assert plan.teacher_tokens < plan.chunk_tokens < plan.num_tokens


@every_width
def test_fused_linear_divergence_in_slices_matches_reference(plans, dtype):
    check_fused_divergence(CASE, dtype, spec("reverse_kl"), "triton", "sum", 11_000)
    assert not plans[-1].whole_rows and plans[-1].num_chunks > 1


@every_reduction
@every_width
@pytest.mark.parametrize("workspace_bytes", [ONE_CHUNK, SEVERAL + 11_000])
def test_bias_and_low_rank_pair_match_reference(workspace_bytes, dtype, reduction):
    torch.manual_seed(3)
    differentiable = {
        "student_bias": torch.randn(301, dtype=torch.float64),
        "student_lora": (
            torch.randn(4, 16, dtype=torch.float64) * 0.3,
            torch.randn(301, 4, dtype=torch.float64) * 0.3,
            0.7,
        ),
    }
    differentiable["student_lora"] = tuple(
        x.to(dtype).double() if isinstance(x, torch.Tensor) else x
        for x in differentiable["student_lora"]
    )
    differentiable["student_bias"] = differentiable["student_bias"].to(dtype).double()
    check_fused_divergence(
        CASE, dtype, spec("forward_kl"), "triton", reduction, workspace_bytes,
        differentiable=differentiable,
    )  # fmt: skip


def test_a_third_model_has_its_part_too(plans):
    inputs = fused_of(CASE, BF16)
    third = {"reference_hidden": inputs.teacher_hidden}
    third["reference_lm_head_weight"] = inputs.teacher_lm_head_weight.flip(0)
    keywords = {"target": opk.targets.geometric(0.2, 0.5, 0.3), **third, **inputs.keywords()}

    def run(function, workspace_bytes=None, **more):
        more |= {} if workspace_bytes is None else {"workspace_bytes": workspace_bytes}
        hidden = leaf(inputs.student_hidden)
        loss = function(hidden, *inputs.tensors()[1:], divergence="jsd", **keywords, **more)[0]
        loss.sum().backward()
        return loss.detach(), hidden.grad

    whole = run(opk.fused_linear_divergence, ONE_CHUNK, backend="triton")
    parts = run(opk.fused_linear_divergence, 26_000, backend="triton")
    assert plans[-1].teacher_tokens < plans[-1].chunk_tokens < plans[0].chunk_tokens
    truth = run(reference.fused_linear_divergence)
    for one, two, exact in zip(whole, parts, truth, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(one.double(), exact.double(), rtol=2e-2, atol=2e-3)


@every_width
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_fused_linear_token_logprobs_matches_reference(
    plans, eager_rounds_grad_logits, option, dtype
):
    inputs = fused_of(FusedCase("gpu_token_ids", 16, 301, 16, 8), dtype)
    extra = [(torch.randn(shape) * 0.5).to(dtype) for shape in ((301,), (4, 16), (301, 4))]

    def bent(function, **fixed):
        def call(hidden, head, bias, down, up, ids, **keywords):
            lora = (down, up, 0.6)
            return function(hidden, head, ids, bias=bias, lora=lora, **fixed, **keywords)

        return call

    check_token_logprobs(
        bent(opk.fused_linear_token_logprobs, backend="triton", workspace_bytes=25_000),
        bent(eager.fused_linear_token_logprobs),
        bent(reference.fused_linear_token_logprobs),
        [inputs.student_hidden, inputs.student_lm_head_weight, *extra],
        token_ids_of(16, 301, 2),
        dtype,
        f"gpu {option} {dtype_id(dtype)}",
        **law_options_of(option, 16),
    )
    assert plans[-1].num_chunks > 1 and plans[-1].grad_hidden_splits > 1


def spy_on_rows(monkeypatch, name):
    """The last argument of each call of a row kernel."""
    seen = []
    rows = torch.ops.opd_triton
    kernel = getattr(rows, name)

    class Rows:
        def __getattr__(self, other):
            return getattr(rows, other)

    def spied(*arguments):
        seen.append(arguments[-1])
        return kernel(*arguments)

    setattr(Rows, name, staticmethod(spied))
    monkeypatch.setattr("opd_kernels._dispatch.row_ops", lambda backend: Rows())
    return seen


@pytest.mark.parametrize(("dtype", "number"), [(F32, -1), (BF16, 2), (F16, 3)])
def test_row_kernels_write_gradients_as_wide_as_the_head(monkeypatch, dtype, number):
    seen = spy_on_rows(monkeypatch, "divergence_fwd_grad_")
    inputs = fused_of(FusedCase("width", 4, 50, 8, 8), dtype)
    hidden = leaf(inputs.student_hidden)
    opk.fused_linear_divergence(hidden, *inputs.tensors()[1:], backend="triton")
    assert seen == [number]
    # columns are packed from float32 values
    opk.fused_linear_divergence(
        hidden, *inputs.tensors()[1:], backend="triton", gradient_tolerance=1e-4
    )
    assert seen == [number, -1]


def test_on_the_cpu_gradients_stay_as_wide_as_logits(monkeypatch):
    monkeypatch.setattr(_gemms, "on_gpu", lambda tensor: False)
    seen = spy_on_rows(monkeypatch, "divergence_fwd_grad_")
    inputs = fused_of(FusedCase("width", 4, 50, 8, 8), BF16)
    opk.fused_linear_divergence(
        leaf(inputs.student_hidden), *inputs.tensors()[1:], backend="triton"
    )
    assert seen == [-1]


# -- gradient_tolerance --------------------------------------------------------------------------


@every_width
@pytest.mark.parametrize("tolerance", [1e-12, 3e-2])
def test_gradient_tolerance_keeps_its_certificate(dtype, tolerance):
    # so small that every column counts, and dense GEMMs run; and one that leaves columns out
    inputs = fused_of(CASE, dtype)

    def run(function, student_dtype, **more):
        hidden, head = (leaf(x, student_dtype) for x in inputs.tensors()[:2])
        out = function(hidden, head, *inputs.tensors()[2:], **inputs.keywords(), **more)
        out[0].sum().backward()
        return out, hidden.grad, head.grad

    asked = {"backend": "triton", "gradient_tolerance": tolerance}
    out, *sparse = run(opk.fused_linear_divergence, dtype, **asked)
    _, *truth = run(reference.fused_linear_divergence, torch.float64)
    dropped = out.statistics["gradient_dropped_l1"].double()
    assert bool((dropped == 0).all()) == (tolerance == 1e-12)
    weights = inputs.token_weights.double()
    head, hidden = inputs.student_lm_head_weight.double(), inputs.student_hidden.double()
    hidden = torch.where((weights == 0).unsqueeze(1), 0.0, hidden)
    rounding = 4 * torch.finfo(dtype).eps
    bound = weights * dropped * head.norm(dim=1).max() + rounding * truth[0].norm(dim=1).max()
    assert bool(((sparse[0].double() - truth[0]).norm(dim=1) <= bound).all())
    bound = (weights * dropped * hidden.norm(dim=1)).sum() + rounding * truth[1].norm(dim=1).sum()
    assert bool((sparse[1].double() - truth[1]).norm(dim=1).sum() <= bound)


class _Memory:
    """Where a buffer begins and ends."""

    def __init__(self, buffer):
        self.begin = buffer.data_ptr()
        self.end = self.begin + buffer.nbytes

    def holds(self, tensor):
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        end = tensor.data_ptr() + (last + 1) * tensor.itemsize
        return self.begin <= tensor.data_ptr() and end <= self.end


@every_width
@pytest.mark.parametrize("tokens", [1, 7, 12])
@pytest.mark.parametrize("kept", [1, 5, 150])
def test_gemms_of_packed_columns_take_the_buffer_s_memory(monkeypatch, dtype, tokens, kept):
    vocab_size, width = 301, 16
    monkeypatch.setattr(sparse_gradient, "is_own", lambda _: False, raising=False)
    monkeypatch.setattr(_gemms, "is_own", lambda _: False)
    torch.manual_seed(tokens)
    dz = torch.zeros(tokens, vocab_size)
    dz[:, torch.randperm(vocab_size)[:kept]] = torch.randn(tokens, kept)
    head, hidden = torch.randn(vocab_size, width).to(dtype), torch.randn(tokens, width).to(dtype)
    buffer = torch.full((tokens * vocab_size,), torch.nan)
    packed, _ = sparse_gradient.pack(torch.ops.opd, dz, None, 1e-6, buffer.view(dz.shape), head, 0)
    if tokens == 1 and packed is None:
        return  # a buffer of 301 numbers
    memory, operands = _Memory(buffer), []

    def spy(out, a, b, **more):
        operands.extend([a, b, out])
        assert a.dtype == b.dtype == dtype
        return gemm.gemm(out, a, b, **more)

    monkeypatch.setattr(sparse_gradient, "gemm", spy)
    monkeypatch.setattr(gemm, "OWN", False)
    for rows_at_a_time in (packed.rows_at_a_time, 16):
        some = packed._replace(rows_at_a_time=min(rows_at_a_time, packed.rows_at_a_time))
        operands.clear()
        got = sparse_gradient.grad_hidden(some, head)
        assert all(memory.holds(x) for x in operands if x.data_ptr() != got.data_ptr())
        assert len(operands) == 3 * -(-kept // some.rows_at_a_time)
        rounded = dz.to(dtype).double()
        torch.testing.assert_close(got.double(), rounded @ head.double(), rtol=1e-5, atol=1e-5)
        operands.clear()
        target = torch.ones(vocab_size, width)
        sparse_gradient.add_grad_weight(torch.ops.opd, target, some, hidden)
        assert all(memory.holds(x) for x in operands if x.data_ptr() != hidden.data_ptr())
        exact = 1 + rounded.T @ hidden.double()
        torch.testing.assert_close(target.double(), exact, rtol=1e-5, atol=1e-5)


# -- float16 -------------------------------------------------------------------------------------


def gradients_of_weight(weight, loss_scale, dtype=F16, zeros=False, **more):
    """(loss, dX, dW) of tokens of one weight, in units of it."""
    inputs = fused_of(FusedCase("small_weights", 12, 301, 16, 24), dtype)
    weights = torch.full((12,), weight)
    if zeros:
        weights[::3] = 0.0
    hidden, head = (leaf(x) for x in inputs.tensors()[:2])
    out = opk.fused_linear_divergence(
        hidden, head, *inputs.tensors()[2:], backend="triton", token_weights=weights, **more
    )
    (out.loss.sum() * loss_scale).backward()
    return out.loss.detach() / weight, hidden.grad, head.grad


@every_reduction
@pytest.mark.parametrize("zeros", [False, True])
def test_float16_gradients_of_small_weights_are_as_accurate_as_of_ones(zeros, reduction):
    more = {"reduction": reduction, "zeros": zeros}
    ones = gradients_of_weight(1.0, 1.0, **more)
    # a power of two, so that nothing but range could make a difference; and no such power
    exact = gradients_of_weight(2.0**-20, 2.0**20, **more)
    for one, two in zip(exact, ones, strict=True):
        assert torch.equal(one, two)
    # the weights themselves are rounded
    for weight in (1e-6, 3e4):
        near = gradients_of_weight(weight, 1 / weight, **more)
        for one, two in zip(near, ones, strict=True):
            bound = 2e-6 if two.dtype == F32 else torch.finfo(F16).eps
            torch.testing.assert_close(one, two, rtol=bound, atol=bound * two.abs().max().item())
    assert bool((ones[2] != 0).any())


def test_float16_gradients_of_small_weights_match_reference():
    inputs = fused_of(FusedCase("small_weights", 12, 301, 16, 24), F16)
    weights = torch.full((12,), 1e-6)

    def run(function, dtype, **more):
        hidden, head = (leaf(x, dtype) for x in inputs.tensors()[:2])
        loss = function(hidden, head, *inputs.tensors()[2:], token_weights=weights, **more)
        loss = loss if isinstance(loss, torch.Tensor) else loss[0]
        (loss.sum() * 1e6).backward()
        return hidden.grad, head.grad

    truth = run(reference.fused_linear_divergence, torch.float64)
    baseline = run(eager.fused_linear_divergence, F16, divergence=spec("reverse_kl"))
    actual = run(opk.fused_linear_divergence, F16, backend="triton")
    for name, got, near, exact in zip(("dX", "dW"), actual, baseline, truth, strict=True):
        assert_within_eager(got, near, exact, f"float16, weights 1e-6: {name}")


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_gradient_unit_of_weights_without_a_size(value):
    head = torch.zeros(2, 2, dtype=F16)
    unit = _linear.gradient_unit(head, torch.tensor([value, 0.0]))
    assert float(unit) == 1 / 16
    assert _linear.gradient_unit(head, None) == unit
    assert _linear.gradient_unit(head, torch.empty(0)) == unit
    assert _linear.gradient_unit(head.bfloat16(), torch.ones(2)) is None


@pytest.mark.parametrize("value", [1e-30, 1e-6, 0.99, 1.0, 1.01, 3e4, 1e30])
def test_gradient_unit_is_a_power_of_two_below_the_largest_weight(value):
    unit = _linear.gradient_unit(torch.zeros(2, 2, dtype=F16), torch.tensor([value / 3, -value]))
    mantissa, _ = torch.frexp(unit)
    assert float(mantissa) == 0.5
    if 1e-19 < value < 1e19:
        assert 16 <= value / float(unit) < 32


@every_half
def test_token_logprobs_of_small_upstream_gradients(dtype):
    inputs = fused_of(FusedCase("small_upstream", 6, 301, 16, 8), dtype)
    ids = token_ids_of(6, 301, 2)

    def run(scale):
        hidden, head = (leaf(x) for x in inputs.tensors()[:2])
        total = torch.zeros_like(head, dtype=F32)
        out = opk.fused_linear_token_logprobs(
            hidden, head, ids, backend="triton", lm_head_weight_grad=total
        )
        (out.logprobs.sum() * scale).backward()
        return total / scale

    assert torch.equal(run(2.0**-24), run(1.0))


# -- split dX ------------------------------------------------------------------------------------


@every_width
@pytest.mark.parametrize("vocab_size", [64, 67, 301])
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_grad_hidden_of_slices_is_the_plain_product(splits, vocab_size, dtype):
    logits = torch.randn(5, vocab_size)
    gradient = logits.view(dtype)[:, :vocab_size].copy_(logits) if dtype != F32 else logits
    head = torch.randn(vocab_size + 3, 16).to(dtype)
    exact = gradient.double() @ head[:vocab_size].double()
    plain = _gemms.grad_hidden(gradient, head, 0)
    split = _gemms.grad_hidden(gradient, head, 0, splits)
    assert plain.dtype == split.dtype == F32
    for product in (plain, split):
        torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-4)
    # in the memory that it is given, and with fewer slices where that is small
    for room in (splits, 1, 0):
        spare = torch.full((room * 5 * 16 + 3,), 7.0)
        product = _gemms.grad_hidden(gradient, head, 0, splits, spare)
        torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-4)
        assert bool((spare[-3:] == 7.0).all())


def test_halves_keep_what_rounding_would_lose():
    values = torch.randn(1000)
    for dtype, bits in ((BF16, 17), (F16, 20)):
        high, low = _gemms.halves(values, dtype)
        assert high.dtype == low.dtype == dtype
        assert float((high.double() + low.double() - values).abs().max()) < 2.0**-bits * 4


# -- ranges --------------------------------------------------------------------------------------


def test_every_phase_has_a_range(monkeypatch):
    import contextlib

    names = []

    @contextlib.contextmanager
    def recorded(tensor, op, name):
        names.append(name)
        yield

    monkeypatch.setattr(_linear, "phase", recorded)
    inputs = fused_of(CASE, BF16)
    hidden, head = (leaf(x) for x in inputs.tensors()[:2])
    lora = torch.randn(2, 16), torch.randn(301, 2), 1.0
    opk.fused_linear_divergence(
        hidden,
        head,
        *inputs.tensors()[2:],
        backend="triton",
        workspace_bytes=SEVERAL + 6_000,
        student_bias=leaf(torch.zeros(301)),
        student_lora=lora,
        **inputs.keywords(),
    )
    first = names[: names.index("grad_low_rank") + 1]
    part = ["take", "teacher_logits", "rows"]
    assert first == [
        "take", "low_rank", "student_logits", "low_rank", *part, *part,
        "grad_hidden", "grad_weight", "grad_bias", "grad_low_rank",
    ]  # fmt: skip


def test_ranges_cost_nothing_off_cuda(monkeypatch):
    monkeypatch.undo()

    def fails(*_):
        raise AssertionError("a range was opened")

    monkeypatch.setattr("torch.cuda.nvtx.range", fails)
    with _linear.phase(torch.zeros(1), "op", "rows") as nothing:
        assert nothing is None


@every_half
def test_low_rank_gradients_lose_nothing_but_the_rounding_of_dz(dtype):
    # through 16-bit halves of float32 factors: as exact as float32 products of the same dZ
    head, logits = torch.zeros(301, 16, dtype=dtype), torch.randn(9, 301)
    gradient = logits.view(dtype)[:, :301].copy_(logits.clone())
    down, up, hidden = torch.randn(4, 16), torch.randn(301, 4), torch.randn(9, 16).to(dtype)
    pair = _gemms.LowRank.of(down, up, head, _gemms.grad_dtype(head))
    projected = pair.project(hidden)
    grads = [torch.ones(shape) for shape in ((9, 16), (4, 16), (301, 4))]
    pair.backproject(gradient, hidden, projected, tuple(grads))
    dz = gradient.double()
    through = dz @ up.double()
    exact = through @ down.double(), through.T @ hidden.double(), dz.T @ projected.double()
    for got, truth in zip(grads, exact, strict=True):
        error = (got.double() - 1 - truth).norm() / truth.norm()
        assert float(error) < 2.0**-16
