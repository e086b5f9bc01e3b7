# SPDX-License-Identifier: Apache-2.0
"""The yardstick and the truth, written apart from each other, agree in float64.

In float32 the yardstick must be finite wherever the truth can be held, and be no worse than
rounding explains: a poor yardstick would let a poor kernel pass.
"""

from __future__ import annotations

import pytest
import torch

from opd_kernels import reference
from tests import eager
from tests.cases import CASES, F32, F64, LIMIT_SPECS, SPECS, Case, fused_of, logits_of
from tests.cases import FusedCase as Fused
from tests.checks import (
    assert_agree,
    kinks,
    leaf,
    settle_heads,
    settle_kinks,
    upstream,
    with_head_mass,
)
from tests.options import OPTIONS, options_of, reference_model_of

EVERY = list(dict.fromkeys((*SPECS, *LIMIT_SPECS)))
SMALL = [case for case in CASES if case.vocab_size <= 4000 and 0 < case.num_tokens <= 127]
WITH_OPTIONS = [
    pytest.param(option, divergence, id=f"{option}-{divergence}")
    for option in OPTIONS
    for divergence in (option.divergences or (None,))
]


def run(function, logits, dtype, **keywords):
    student = leaf(logits.student, dtype)
    loss = function(student, logits.teacher, **(logits.keywords() | keywords))
    loss.backward(upstream(len(student)).to(loss.dtype))
    return loss.detach(), student.grad


def assert_same(actual, expected, what):
    """Equal to rounding, relative to each row's largest element, where the truth is finite."""
    for got, exact in zip(actual, expected, strict=True):
        rows = exact if exact.dim() == 2 else exact.unsqueeze(1)
        finite = rows.isfinite().all(1)
        error = (got.reshape(rows.shape) - rows).abs().amax(1)
        bound = 3e-11 * rows.abs().amax(1).clamp_min(1e-3)
        assert bool((error <= bound)[finite].all()), what


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_eager_is_the_reference_in_float64(divergence):
    for case in SMALL:
        logits = logits_of(case, F64)
        truth = run(reference.divergence, logits, F64, divergence=divergence)
        actual = run(eager.divergence, logits, F64, divergence=divergence)
        finite = truth[0].isfinite()
        assert bool((actual[0].isfinite() == finite).all()), case.name
        assert_same([x[finite] for x in actual], [x[finite] for x in truth], case.name)


@pytest.mark.parametrize(("option", "divergence"), WITH_OPTIONS)
def test_eager_is_the_reference_in_float64_with_options(option, divergence):
    case = Case("options", 12, 150, weights="some_zero", student_padding=4, teacher_padding=9)
    logits = logits_of(case, F64)
    keywords = {"divergence": divergence, **options_of(option, case.num_tokens, case.vocab_size)}
    if option.reads_reference:
        keywords["reference_logits"] = reference_model_of(logits.teacher, 1)
    truth = run(reference.divergence, logits, F64, **keywords)
    actual = run(eager.divergence, logits, F64, **keywords)
    if divergence is not None and divergence.name == "total_variation":
        kink = kinks(logits, logits.keywords() | keywords, upstream(case.num_tokens))
        actual = settle_kinks(actual, truth, *kink)
    assert_same(actual, truth, str(option))


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_eager_is_good_in_float32(divergence):
    for case in SMALL:
        check_float32(divergence, case)


def check_float32(divergence, case):
    logits = logits_of(case, F32)
    truth = run(reference.divergence, logits, F64, divergence=divergence)
    actual = run(eager.divergence, logits, F32, divergence=divergence)
    names = {divergence.name}
    if divergence.name == "adaptive_kl":
        others = [
            run(reference.divergence, logits, F64, divergence=with_head_mass(divergence, factor))
            for factor in (1 - 1e-5, 1 + 1e-5)
        ]
        actual, truth = settle_heads(actual, actual, [truth, *others])
        actual = tuple(x.float() for x in actual)
    # as a baseline for itself: this asks that it is finite where the truth is
    pretended = [
        torch.where(exact.isfinite(), got, exact.float())
        for got, exact in zip(actual, truth, strict=True)
    ]
    assert_agree(pretended, actual, truth, names, f"{divergence} {case.name}")
    if divergence.name == "total_variation":
        return
    held = (truth[1].abs() <= torch.finfo(F32).max / 4).all(1) & truth[0].isfinite()
    for got, exact in zip(actual, truth, strict=True):
        if bool(held.any()):
            error = (got[held].double() - exact[held]).abs().max()
            assert bool(error <= 1e-3 * exact[held].abs().max().clamp_min(1e-2)), case.name


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_eager_fused_is_the_reference_in_float64(option):
    case = Fused("options", 8, 60, 6, 9, weights="some_zero", student_padding=2)
    inputs = fused_of(case, F64)
    keywords = {**inputs.keywords(), **options_of(option, case.num_tokens, case.vocab_size)}
    if option.divergences is not None:
        keywords["divergence"] = option.divergences[-1]
    generator = torch.Generator().manual_seed(3)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    if option.reads_reference:
        keywords["reference_hidden"] = gaussian(8, 5).masked_fill(
            inputs.token_weights.unsqueeze(1) == 0, torch.nan
        )
        keywords["reference_lm_head_weight"] = gaussian(64, 5)
        keywords["reference_bias"] = gaussian(61)
    extra = gaussian(62), gaussian(3, 6), gaussian(62, 3)

    def gradients(function, **more):
        leaves = [leaf(x) for x in (*inputs.tensors()[:2], *extra)]
        out = function(
            *leaves[:2],
            *inputs.tensors()[2:],
            student_bias=leaves[2],
            student_lora=(*leaves[3:], 0.5),
            **keywords,
            **more,
        )
        loss = out if isinstance(out, torch.Tensor) else out.loss
        loss.backward(upstream(case.num_tokens).to(F64))
        return [loss.detach(), *(x.grad for x in leaves)]

    truth = gradients(reference.fused_linear_divergence, reduction="none")
    for got, exact in zip(gradients(eager.fused_linear_divergence), truth, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-11)
