# SPDX-License-Identifier: Apache-2.0
"""Runs an op, eager torch and the float64 reference on one case and compares loss and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

import opd_kernels as opk
from opd_kernels import _laws, reference
from tests import eager
from tests.cases import Case, FusedCase, Logits, Spec, fused_of, logits_of
from tests.tolerance import assert_within_eager


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
    case: Case, dtype: torch.dtype, divergence: Spec, backend: str, max_tokens: int | None = None
) -> None:
    """Loss and gradient of `opk.divergence` on one case, by the tolerance rule."""
    logits = logits_of(case, dtype)
    if max_tokens is not None:
        logits = logits.first(max_tokens)
    what = f"{backend} {divergence} {case.name} {dtype_id(dtype)}"
    grad_loss = upstream(logits.student.shape[0]).to(torch.promote_types(dtype, torch.float32))

    truth_logits, truth = run_reference(logits, divergence, grad_loss)
    eager_logits = leaf(logits.student)
    baseline = eager.divergence(
        eager_logits, logits.teacher, divergence=divergence, **logits.keywords()
    )
    baseline.backward(grad_loss)
    student = leaf(logits.student)
    loss = opk.divergence(
        student,
        logits.teacher,
        divergence=divergence.public(),
        **logits.keywords(),
        backend=backend,
    )
    loss.backward(grad_loss)

    assert loss.dtype == torch.promote_types(dtype, torch.float32), f"{what}: {loss.dtype}"
    assert student.grad.dtype == dtype, f"{what}: gradient is {student.grad.dtype}"
    assert_within_eager(loss, baseline, truth, f"{what} loss")
    # where the gradient itself is infinite (reverse_kl with p = 0 < q), no value is the right one
    finite = truth_logits.grad[:, : case.vocab_size].isfinite().all(dim=1)
    gradient, exact = student.grad.detach().clone(), truth_logits.grad
    if divergence.name == "total_variation":
        settle_kinks(gradient, eager_logits.grad, exact, logits, case.vocab_size, grad_loss)
    assert_within_eager(
        gradient[finite], eager_logits.grad[finite], exact[finite], f"{what} gradient"
    )
    beyond = student.grad[:, case.vocab_size :]
    assert bool((beyond == 0).all()), f"{what}: gradient beyond vocab_size is not zero"
    if logits.token_weights is not None:
        masked = logits.token_weights == 0
        assert bool((loss[masked] == 0).all()), f"{what}: loss of weight-0 rows is not zero"
        assert bool((student.grad[masked] == 0).all()), f"{what}: gradient of weight-0 rows"


def settle_kinks(
    gradient: Tensor,
    eager_gradient: Tensor,
    exact: Tensor,
    logits: Logits,
    vocab_size: int,
    grad_loss: Tensor,
) -> None:
    """|p - q| has no derivative where p = q: any value between the one-sided ones is right there.

    Where |log p - log q| is below the rounding of the logits, a gradient inside that interval (of
    width q * upstream) is replaced by the reference's own choice; one outside stays and fails.
    """
    temperatures = logits.temperatures()
    pair = (logits.student, logits.teacher)
    scaled = [x[:, :vocab_size].double() / t for x, t in zip(pair, temperatures, strict=True)]
    student, teacher = (torch.log_softmax(x, dim=-1) for x in scaled)
    largest = max(
        [0.0, *(float(x[x.isfinite()].abs().max()) for x in scaled if x.isfinite().any())]
    )
    eps = torch.finfo(torch.promote_types(logits.student.dtype, torch.float32)).eps
    kink = (student - teacher).abs() <= 4 * eps * max(1.0, largest)
    width = student.exp() * grad_loss.abs().double().unsqueeze(1) / temperatures[0]
    if logits.token_weights is not None:
        width = width * logits.token_weights.double().unsqueeze(1)
    for candidate in (gradient, eager_gradient):
        part = candidate[:, :vocab_size]
        inside = (part.double() - exact[:, :vocab_size]).abs() <= width * (1 + 1e-2)
        part[kink & inside] = exact[:, :vocab_size][kink & inside].to(part.dtype)


def run_reference(logits: Logits, divergence: Spec, grad_loss: Tensor) -> tuple[Tensor, Tensor]:
    """(float64 logits that carry the gradient, loss)."""
    student = leaf(logits.student, torch.float64)
    loss = reference.divergence(student, logits.teacher, divergence=divergence, **logits.keywords())
    loss.backward(grad_loss.to(torch.float64))
    return student, loss


def check_fused_divergence(
    case: FusedCase,
    dtype: torch.dtype,
    divergence: Spec,
    backend: str,
    reduction: str,
    workspace_bytes: int,
) -> None:
    """Loss and gradients of `opk.fused_linear_divergence` on one case, by the tolerance rule."""
    inputs = fused_of(case, dtype)
    what = f"{backend} {divergence} {case.name} {dtype_id(dtype)} {reduction}"
    real = torch.promote_types(dtype, torch.float32)
    grad_loss = upstream(case.num_tokens) if reduction == "none" else torch.tensor(0.3)

    def run(function, student_dtype: torch.dtype, **keywords):
        hidden, head = (leaf(x, student_dtype) for x in inputs.tensors()[:2])
        loss = function(hidden, head, *inputs.tensors()[2:], **inputs.keywords(), **keywords)
        loss = loss if isinstance(loss, Tensor) else loss.loss
        if reduction == "sum" and loss.dim():
            loss = loss.sum()
        loss.backward(grad_loss.to(loss.dtype))
        return loss, hidden.grad, head.grad

    truth = run(
        reference.fused_linear_divergence,
        torch.float64,
        divergence=divergence,
        reduction=reduction,
    )
    baseline = run(eager.fused_linear_divergence, dtype, divergence=divergence)
    actual = run(
        opk.fused_linear_divergence,
        dtype,
        divergence=divergence.public(),
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    assert actual[0].dtype == real, f"{what}: loss is {actual[0].dtype}"
    names = ("loss", "hidden gradient", "head gradient")
    for name, got, eager_value, exact in zip(names, actual, baseline, truth, strict=True):
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
