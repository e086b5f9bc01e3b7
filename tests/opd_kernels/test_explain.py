# SPDX-License-Identifier: Apache-2.0
"""explain(op, ...) tells the backend, every refusal and the plan, and computes nothing."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk


def test_explain_names_the_choice_and_every_reason():
    text = opk.explain("divergence", torch.zeros(4, 20), torch.zeros(4, 20))
    first, *rest = text.splitlines()
    assert first == "divergence: backend 'cpu' for torch.float32 on cpu"
    assert [line.split(":")[0].strip() for line in rest] == ["cpu", "cuda", "triton", "reference"]
    assert "cannot run (the tensors are on cpu)" in rest[1]


def test_explain_gives_the_plan_of_a_fused_op():
    tensors = (torch.zeros(100, 8), torch.zeros(50, 8), torch.zeros(100, 6), torch.zeros(50, 6))
    text = opk.explain("fused_linear_divergence", *tensors, workspace_bytes=10_000)
    # 4 bytes x (2 x 50 logits + 8 + 6 + 8 hidden) = 488 bytes per token: 20 tokens per chunk
    assert "path A: 5 chunk(s) of up to 20 of 100 tokens" in text
    assert "path A: 1 chunk(s) of up to 100" in opk.explain("fused_linear_divergence", *tensors)


def test_explain_says_when_and_why_the_vocabulary_is_cut():
    tensors = (torch.zeros(100, 8), torch.zeros(900, 8), torch.zeros(100, 6), torch.zeros(900, 6))
    small = {"workspace_bytes": 40_000}
    text = opk.explain("fused_linear_divergence", *tensors, **small)
    assert "path B: " in text
    assert "slices of the vocabulary" in text
    assert "whole rows of 5 tokens would make GEMMs too short" in text
    text = opk.explain("fused_linear_divergence", *tensors, divergence="adaptive_kl", **small)
    assert "path A: 20 chunk(s) of up to 5 of 100 tokens" in text
    assert "short chunks: adaptive_kl sorts the teacher's law" in text
    text = opk.explain("fused_linear_token_logprobs", *tensors[:2], **small)
    assert "path A" in text


def test_explain_counts_the_reference_model():
    tensors = (torch.zeros(100, 8), torch.zeros(50, 8), torch.zeros(100, 6), torch.zeros(50, 6))
    text = opk.explain(
        "fused_linear_divergence",
        *tensors,
        reference_lm_head_weight=torch.zeros(50, 6),
        workspace_bytes=14_240,
    )
    # 4 bytes x (3 x 50 logits + 8 + 6 + 6 + 8 hidden) = 712 bytes per token
    assert "path A: 5 chunk(s) of up to 20 of 100 tokens" in text


def test_explain_of_two_vocabularies_counts_both_and_what_picks_their_cells():
    tensors = (torch.zeros(100, 8), torch.zeros(50, 8), torch.zeros(100, 6), torch.zeros(70, 6))
    ids = torch.arange(40), torch.arange(40)
    op = "fused_linear_overlap_divergence"
    assert "path A: 1 chunk(s) of up to 100" in opk.explain(op, *tensors, *ids)
    text = opk.explain(op, *tensors, *ids, workspace_bytes=30_000)
    # 8 x 3 x 120 bytes of ids; a row has 4 bytes x (120 logits + 124 cells and others + 28) + 64
    assert "path A: 5 chunk(s) of up to 20 of 100 tokens" in text


def test_explain_of_shared_rows_alone_is_that_of_one_vocabulary():
    """Which takes less than what picks cells would: 24 bytes for each token."""
    tensors = (torch.zeros(9, 8), torch.zeros(6000, 8), torch.zeros(9, 6), torch.zeros(6500, 6))
    ids = torch.arange(5000)
    options = {"workspace_bytes": 60_000, "tail": "renormalize_both"}
    text = opk.explain("fused_linear_overlap_divergence", *tensors, ids, ids, **options)
    heads = tensors[0], tensors[1][:5000], tensors[2], tensors[3][:5000]
    one = opk.explain("fused_linear_divergence", *heads, workspace_bytes=60_000)
    assert one.splitlines()[-1].strip() in text
    opk.fused_linear_overlap_divergence(*tensors, ids, ids, **options)
    with pytest.raises(ValueError, match=r"must be at least 4\d{5} .*got 60000"):
        opk.explain("fused_linear_overlap_divergence", *tensors, ids, ids, workspace_bytes=60_000)


def test_explain_accepts_meta_tensors():
    head = torch.empty(151936, 4096, device="meta", dtype=torch.bfloat16)
    hidden = torch.empty(8192, 4096, device="meta", dtype=torch.bfloat16)
    with pytest.raises(opk.UnsupportedBackendError, match="the tensors are on meta"):
        opk.explain("fused_linear_token_logprobs", hidden, head)
    text = opk.explain("fused_linear_token_logprobs", hidden, head, backend="reference")
    assert "backend 'reference'" in text


def test_explain_refuses_an_option_that_no_op_has():
    with pytest.raises(ValueError, match=r"option must be one of .*, got 'bakend'"):
        opk.explain("divergence", torch.zeros(2, 3), bakend="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("divergense",), "op must be one of 'divergence', .*got 'divergense'"),
        (("divergence",), "divergence must be given the tensors of the call"),
        (("fused_linear_divergence", torch.zeros(2, 3)), "must be given 4 tensors, got 1"),
    ],
)
def test_explain_rejects_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        opk.explain(*arguments)
