# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

import opd_kernels as opk


def _packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("lengths", [[], [0], [1, 1, 1], [3, 0, 2, 1, 0], [7]], ids=str)
def test_chunks_are_sums_of_their_tokens(lengths):
    offsets = _packed(lengths)
    values = -torch.rand(int(offsets[-1]), dtype=torch.float64)
    chunks = opk.chunk_logprobs(values, offsets)
    expected = [float(part.sum()) for part in values.split(lengths)] if lengths else []
    assert chunks.tolist() == pytest.approx(expected, abs=1e-15)
    index = opk.chunk_index(offsets)
    assert index.length.tolist() == lengths
    for length, first, last, begin in zip(*(x.tolist() for x in index), offsets, strict=False):
        assert (first, last) == ((begin, begin + length - 1) if length else (0, 0))


def test_chunk_logprobs_has_gradients_of_any_order():
    offsets = _packed([2, 0, 3])
    values = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: opk.chunk_logprobs(x, offsets), values)
    assert torch.autograd.gradgradcheck(lambda x: opk.chunk_logprobs(x, offsets).exp(), values)


def test_a_chunk_is_as_likely_as_its_tokens_one_after_the_other():
    """p(ab) = p(a) p(b | a), which is what one token of the same bytes would have."""
    probabilities = torch.tensor([0.5, 0.25, 0.8])
    chunks = opk.chunk_logprobs(probabilities.log(), torch.tensor([0, 2, 3])).exp()
    torch.testing.assert_close(chunks, torch.tensor([0.125, 0.8]))


def test_what_is_no_chunk_is_refused():
    values = torch.zeros(3)
    with pytest.raises(ValueError, match="token_logprobs must have 1"):
        opk.chunk_logprobs(values[None], torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="chunk_logprobs: offsets must end at 3"):
        opk.chunk_logprobs(values, torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="offsets must be int64 or int32"):
        opk.chunk_index(values)
    with pytest.raises(ValueError, match="at least one value"):
        opk.chunk_index(torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("offsets", [[1, 2], [0, 2, 1]])
def test_offsets_that_are_none_are_refused_by_name(offsets):
    offsets = torch.tensor(offsets)
    with pytest.raises(ValueError, match="chunk_index: offsets must start at 0 and never decrease"):
        opk.chunk_index(offsets)
    with pytest.raises(ValueError, match="chunk_logprobs: offsets must start at 0"):
        opk.chunk_logprobs(torch.zeros(int(offsets[-1])), offsets)
    with pytest.raises(TypeError, match="chunk_logprobs: token_logprobs must be a floating tensor"):
        opk.chunk_logprobs(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]))
