# SPDX-License-Identifier: Apache-2.0
"""Losses of two vocabularies on a GPU: sorted laws and shared tokens against float64, no sync."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import two_vocabularies
from benchmarks.gpu.cases import Inputs
from tests.tolerance import assert_within_eager

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned")]


def losses_of(op: str, pair: two_vocabularies.Pair, backend: str, **options):
    """(ours, eager torch's) of the four tensors."""
    if op == two_vocabularies.SORTED and backend == "triton":
        pytest.skip("Triton has no sort")
    options["backend"] = backend
    if op == two_vocabularies.SORTED:
        return two_vocabularies.sorted_loss(**options), two_vocabularies.eager_sorted
    return two_vocabularies.overlap_loss(pair, **options), two_vocabularies.eager_overlap(pair)


def values_of(loss, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Loss, dX and dW of the same numbers in this dtype."""
    tensors = Inputs(*(tensor.detach().to(dtype) for tensor in inputs)).with_head("trained")
    value = loss(*tensors)
    value.backward()
    return [value.detach(), tensors.student_hidden.grad, tensors.student_lm_head_weight.grad]


@pytest.mark.parametrize("op", two_vocabularies.OPS)
def test_two_vocabularies_at_real_size(device, sizes, backend, op):
    shape = sizes.fused._replace(num_tokens=sizes.slice_tokens)
    pair = two_vocabularies.pair_of(device, shape, torch.bfloat16)
    # what the pairs take, and about half of the rows
    workspace_bytes = (64 + 8 * shape.num_tokens) * shape.vocab_size
    ours, eager = losses_of(op, pair, backend, workspace_bytes=workspace_bytes)
    exact, baseline = (
        values_of(eager, pair.inputs, dtype) for dtype in (torch.float64, torch.float32)
    )
    found = values_of(ours, pair.inputs, torch.float32)
    assert_within_eager(found[0], baseline[0], exact[0], f"{op} loss")
    for what, got, other, truth in zip(
        ("dX", "dW"), found[1:], baseline[1:], exact[1:], strict=True
    ):
        # of the norm: a rank whose two laws are all but equal has either sign
        error, allowed = ((grad.double() - truth).norm() for grad in (got, other))
        floor = 4 * torch.finfo(torch.float32).eps * truth.norm()
        assert error <= 2 * allowed + floor, f"{op} {what}: {error} beside eager's {allowed}"
    # and of 16-bit inputs, whose gradients are rounded once
    for got, truth in zip(values_of(ours, pair.inputs, torch.bfloat16), exact, strict=True):
        assert (got.double() - truth).norm() <= torch.finfo(torch.bfloat16).eps * truth.norm()


@pytest.mark.parametrize("op", two_vocabularies.OPS)
def test_two_vocabularies_without_a_host_sync(device, sizes, backend, op):
    pair = two_vocabularies.pair_of(device, sizes.fused._replace(num_tokens=24), torch.bfloat16)
    loss, _ = losses_of(op, pair, backend, compact_tokens=False)
    first = values_of(loss, pair.inputs, torch.bfloat16)
    with device.no_host_sync():
        again = values_of(loss, pair.inputs, torch.bfloat16)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other)
