# SPDX-License-Identifier: Apache-2.0
"""Runs an op, eager torch and the float64 reference on one case and compares loss and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import opd_kernels as opk
from opd_kernels import _laws, reference
from tests import eager
from tests.cases import Case, FusedCase, Logits, Spec, fused_of, logits_of, spec
from tests.options import Option, options_of, reference_model_of
from tests.tolerance import assert_within_eager

Divergences = Spec | Sequence[tuple[float | Tensor, Spec]]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def upstream(num_tokens: int) -> Tensor:
    """A gradient of the loss that differs by token and passes through zero."""
    return torch.linspace(-1.0, 2.0, num_tokens) if num_tokens > 1 else torch.ones(num_tokens)


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A differentiable copy with the same strides."""
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=tensor.device
    )
    with torch.no_grad():
        copy.copy_(tensor)
    return copy.requires_grad_()


def public(divergence: Divergences):
    """What the public API takes for a Spec, or for a sum [(coefficient, Spec), ...]."""
    if isinstance(divergence, Spec):
        return divergence.public()
    return [(coefficient, component.public()) for coefficient, component in divergence]


def components(divergence: Divergences) -> list[tuple[float | Tensor, Spec]]:
    return [(1.0, divergence)] if isinstance(divergence, Spec) else list(divergence)


def laws_of(student: Tensor, vocab_size: int, **keywords) -> _laws.Laws:
    """The packed laws of a call on these logits or hidden states, to call the ops themselves."""
    defaults = {
        "divergence": "jsd",
        "temperature": 1.0,
        "token_weights": None,
        "target": None,
        "has_reference": False,
        "softcaps": (None, None, None),
        "logit_scales": (1.0, 1.0, 1.0),
        "labels": None,
        "label_weights": None,
    }
    rows = _laws.rows_of("test", student)
    return _laws.pack(rows, vocab_size, **{**defaults, **keywords})


def check_divergence(
    case: Case,
    dtype: torch.dtype,
    divergence: Spec | None,
    backend: str,
    max_tokens: int | None = None,
    option: Option | None = None,
) -> None:
    """Loss and gradient of `opk.divergence` on one case, by the tolerance rule."""
    logits = logits_of(case, dtype)
    if max_tokens is not None:
        logits = logits.first(max_tokens)
    keywords = {"divergence": divergence, **logits.keywords()}
    if option is not None:
        keywords |= options_of(option, logits.student.shape[0], case.vocab_size)
        if option.reads_reference:
            keywords["reference_logits"] = reference_model_of(logits.teacher, case.seed)
    what = f"{backend} {divergence} {option or ''} {case.name} {dtype_id(dtype)}"
    grad_loss = upstream(logits.student.shape[0]).to(torch.promote_types(dtype, torch.float32))

    def run(function, student_dtype: torch.dtype, **changes) -> tuple[Tensor, Tensor]:
        student = leaf(logits.student, student_dtype)
        loss = function(student, logits.teacher, **(keywords | changes))
        loss.backward(grad_loss.to(loss.dtype))
        return loss.detach(), student.grad

    truth = run(reference.divergence, torch.float64)
    baseline = run(eager.divergence, dtype)
    asked = {"divergence": public(keywords["divergence"]), "backend": backend}
    loss, gradient = actual = run(opk.divergence, dtype, **asked)

    assert loss.dtype == torch.promote_types(dtype, torch.float32), f"{what}: {loss.dtype}"
    assert gradient.dtype == dtype, f"{what}: gradient is {gradient.dtype}"
    beyond = gradient[:, case.vocab_size :]
    assert bool((beyond == 0).all()), f"{what}: gradient beyond vocab_size is not zero"
    if logits.token_weights is not None:
        masked = logits.token_weights == 0
        assert bool((loss[masked] == 0).all()), f"{what}: loss of weight-0 rows is not zero"
        assert bool((gradient[masked] == 0).all()), f"{what}: gradient of weight-0 rows"
    names = {component.name for _, component in components(keywords["divergence"])}
    if "total_variation" in names:
        kink = kinks(logits, keywords, grad_loss)
        actual, baseline = (settle_kinks(pair, truth, *kink) for pair in (actual, baseline))
    if "adaptive_kl" in names:
        edge = 4 * rounding_of_logprobs(logits, keywords)
        others = [
            run(
                reference.divergence,
                torch.float64,
                divergence=with_head_mass(keywords["divergence"], factor),
            )
            for factor in (1 - edge, 1 + edge)
        ]
        baseline, truth = settle_heads(actual, baseline, [truth, *others])
    assert_agree(actual, baseline, truth, names, what)


def assert_agree(
    actual: tuple[Tensor, Tensor],
    baseline: tuple[Tensor, Tensor],
    truth: tuple[Tensor, Tensor],
    names: set[str],
    what: str,
) -> None:
    """(loss [T], gradient [T, V]) by the tolerance rule, where the output's dtype can hold it."""
    loss, gradient = actual
    exact_loss, exact_gradient = truth
    too_large = exact_loss.isfinite() & (exact_loss.abs() > torch.finfo(loss.dtype).max / 4)
    overflown = loss[too_large].abs() > torch.finfo(loss.dtype).max / 16
    assert bool(overflown.all()), f"{what}: an overflowing loss is {loss[too_large]}"
    kept = ~too_large
    assert_within_eager(loss[kept], baseline[0][kept], exact_loss[kept], f"{what} loss")
    # where the gradient itself is infinite (reverse_kl with p = 0 < q), no value is the right one
    finite = (exact_gradient.abs() <= torch.finfo(gradient.dtype).max / 4).all(dim=1)
    if "alpha_beta" in names:
        # nor where the loss is, for this one: its reference takes an infinite summand as constant
        finite &= exact_loss.isfinite()
    assert_within_eager(
        gradient[finite], baseline[1][finite], exact_gradient[finite], f"{what} gradient"
    )


def rounding_of_logprobs(logits: Logits, keywords: dict) -> float:
    """How far rounding of the logits may move a log-probability, for the larger of the models."""
    scaled = eager.laws(logits.student, logits.teacher, **keywords)
    largest = max([1.0, *(float(x[x.isfinite()].abs().max()) for x in scaled if x.numel())])
    return torch.finfo(torch.promote_types(logits.student.dtype, torch.float32)).eps * largest


def kinks(logits: Logits, keywords: dict, grad_loss: Tensor) -> tuple[Tensor, Tensor]:
    """Where |log p - log q| is below the rounding of the logits, and q * upstream there.

    |p - q| has no derivative where p = q: any value between the one-sided ones is right there.
    """
    student, teacher = eager.laws(logits.student, logits.teacher, **keywords)
    kink = (student - teacher).abs() <= 4 * rounding_of_logprobs(logits, keywords)
    upstream_size = grad_loss.abs().double()
    if logits.token_weights is not None:
        upstream_size = upstream_size * logits.token_weights.double()
    share = torch.zeros_like(upstream_size)
    for coefficient, component in components(keywords["divergence"]):
        if component.name == "total_variation":
            share = share + torch.as_tensor(coefficient, dtype=torch.float64).abs()
    temperature = keywords["temperature"]
    temperature = temperature[0] if isinstance(temperature, (tuple, list)) else temperature
    scale = keywords.get("student_logit_scale", 1.0)
    width = scale * upstream_size * share / torch.as_tensor(temperature, dtype=torch.float64)
    return kink, student.exp() * width.unsqueeze(1)


def settle_kinks(
    pair: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], kink: Tensor, width: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) with the reference's own choice where a gradient is right at a kink.

    A gradient outside the interval of one-sided derivatives stays as it is, and fails.
    """
    loss, gradient = pair[0], pair[1].clone()
    part, exact = gradient[:, : kink.shape[1]], truth[1][:, : kink.shape[1]]
    inside = (part.double() - exact).abs() <= width * (1 + 1e-2)
    part[kink & inside] = exact[kink & inside].to(part.dtype)
    return loss, gradient


def with_head_mass(divergence: Divergences, factor: float) -> list[tuple[float | Tensor, Spec]]:
    """The same sum with every head of adaptive_kl that much larger."""
    changed = []
    for coefficient, component in components(divergence):
        if component.name == "adaptive_kl":
            head_mass = dict(component.params).get("head_mass", 0.5)
            component = spec("adaptive_kl", head_mass=head_mass * factor)
        changed.append((coefficient, component))
    return changed


def settle_heads(
    actual: tuple[Tensor, Tensor],
    baseline: tuple[Tensor, Tensor],
    truths: list[tuple[Tensor, Tensor]],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(baseline, truth) where the head of adaptive_kl may end a token earlier or later.

    Whether the token at its edge is in is decided by a sum that rounding moves. In each row the
    truth is that of the nearest head, for the kernel and for eager alike; the baseline is shifted
    so that both can be held to one truth.
    """

    def nearest(pair: tuple[Tensor, Tensor]) -> Tensor:
        distances = [
            (pair[0].double() - loss).abs() + (pair[1].double() - gradient).abs().sum(1)
            for loss, gradient in truths
        ]
        return torch.stack(distances).nan_to_num(torch.inf, torch.inf).argmin(0)

    def chosen(index: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(index))
        losses, gradients = zip(*truths, strict=True)
        return torch.stack(losses)[index, rows], torch.stack(gradients)[index, rows]

    mine, theirs = chosen(nearest(actual)), chosen(nearest(baseline))
    shifted = tuple(
        torch.where(truth.isfinite(), value.double() + (truth - own), value.double())
        for value, truth, own in zip(baseline, mine, theirs, strict=True)
    )
    return shifted, mine


def check_fused_divergence(
    case: FusedCase,
    dtype: torch.dtype,
    divergence: Spec | None,
    backend: str,
    reduction: str,
    workspace_bytes: int,
    option: Option | None = None,
    differentiable: dict[str, Tensor | tuple[Tensor, Tensor, float]] | None = None,
) -> None:
    """Loss and gradients of `opk.fused_linear_divergence` on one case, by the tolerance rule.

    differentiable: a bias or LoRA of the student by keyword, whose gradients are compared too.
    """
    inputs = fused_of(case, dtype)
    what = f"{backend} {divergence} {option or ''} {case.name} {dtype_id(dtype)} {reduction}"
    real = torch.promote_types(dtype, torch.float32)
    grad_loss = upstream(case.num_tokens) if reduction == "none" else torch.tensor(0.3)
    keywords = {"divergence": divergence, **inputs.keywords()}
    if option is not None:
        keywords |= options_of(option, case.num_tokens, case.vocab_size)
        if option.reads_reference:
            keywords["reference_hidden"] = inputs.teacher_hidden
            keywords["reference_lm_head_weight"] = reference_model_of(
                inputs.teacher_lm_head_weight, case.seed
            )

    def run(function, student_dtype: torch.dtype, **changes):
        hidden, head = (leaf(x, student_dtype) for x in inputs.tensors()[:2])
        leaves, more = [hidden, head], {}
        for name, value in (differentiable or {}).items():
            if isinstance(value, Tensor):
                more[name] = leaf(value, student_dtype)
                leaves.append(more[name])
            else:
                down, up = (leaf(x, student_dtype) for x in value[:2])
                more[name] = (down, up, value[2])
                leaves += [down, up]
        loss = function(hidden, head, *inputs.tensors()[2:], **(keywords | more | changes))
        loss = loss if isinstance(loss, Tensor) else loss.loss
        if reduction == "sum" and loss.dim():
            loss = loss.sum()
        loss.backward(grad_loss.to(loss.dtype))
        return loss, *(x.grad for x in leaves)

    truth = run(reference.fused_linear_divergence, torch.float64, reduction=reduction)
    baseline = run(eager.fused_linear_divergence, dtype)
    actual = run(
        opk.fused_linear_divergence,
        dtype,
        divergence=public(keywords["divergence"]),
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    assert actual[0].dtype == real, f"{what}: loss is {actual[0].dtype}"
    names = ["loss", "hidden gradient", "head gradient", *(differentiable or {}), "lora gradient"]
    for name, got, eager_value, exact in zip(names, actual, baseline, truth, strict=False):
        assert_within_eager(got, eager_value, exact, f"{what} {name}")
    if inputs.token_weights is not None:
        masked = inputs.token_weights == 0
        assert bool((actual[1][masked] == 0).all()), f"{what}: hidden gradient of weight-0 rows"
    assert bool((actual[2][case.vocab_size :] == 0).all()), f"{what}: gradient of padded head rows"


def workspace_for(case: FusedCase, num_tokens: int) -> int:
    """A byte budget that makes a call on this case take several chunks of about `num_tokens`."""
    hidden_sizes = case.student_hidden_size + case.teacher_hidden_size
    return num_tokens * 8 * (2 * case.vocab_size + 2 * hidden_sizes) + 64 * hidden_sizes


def check_token_logprobs(
    function,
    eager_function,
    reference_function,
    tensors,
    token_ids: Tensor,
    dtype,
    what,
    **keywords,
) -> None:
    """The three outputs and the gradients of `tensors`, with upstream gradients for each output."""
    num_tokens = token_ids.shape[0]
    grads = [upstream(num_tokens), upstream(num_tokens).flip(0) * 0.5, upstream(num_tokens) - 0.3]

    def run(function, tensor_dtype, **more):
        leaves = [leaf(tensor, tensor_dtype) for tensor in tensors]
        outputs = tuple(function(*leaves, token_ids, **keywords, **more))
        torch.autograd.backward(
            outputs, [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
        )
        return [*outputs, *(tensor.grad for tensor in leaves)]

    truth = run(reference_function, torch.float64)
    baseline = run(eager_function, dtype)
    actual = run(function, dtype)
    names = ["logprobs", "lse", "entropy", *(f"gradient {i}" for i in range(len(tensors)))]
    for name, got, eager_value, exact in zip(names, actual, baseline, truth, strict=True):
        assert_within_eager(got, eager_value, exact, f"{what} {name}")
