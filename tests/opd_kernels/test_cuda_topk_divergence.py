# SPDX-License-Identifier: Apache-2.0
"""The CUDA topk_divergence kernels under emulation, by the public op and the raw ops."""

from __future__ import annotations

import pytest
import torch

from opd_kernels.token_logprobs import Law
from tests import topk_rows, twins
from tests.native import needs_kernels
from tests.twins.topk_divergence import (  # noqa: F401
    test_a_row_of_no_finite_logit_is_nan,
    test_a_row_without_a_law_is_nan_and_its_neighbours_are_not,
    test_an_id_out_of_range_is_nan_and_reads_nothing,
    test_row_ops_opcheck,
    test_rows_in_place_are_bwd,
    test_rows_of_any_number_of_ids_match_float64,
    test_rows_of_no_tokens,
    test_rows_with_options_match_float64,
    test_rows_with_strides,
    test_the_tail_is_a_sum_and_no_difference,
    test_the_tail_is_nothing_exactly_where_nothing_is_off_the_ids,
    test_topk_divergence_compiles_without_a_graph_break,
    test_topk_divergence_matches_reference,
    test_topk_divergence_of_every_kind_matches_reference,
    test_topk_divergence_refuses_float64_in_words,
    test_what_has_no_gradient_is_not_read,
)

pytestmark = [needs_kernels("topk_divergence"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu(emulated_cuda):
    return twins.cuda()


@pytest.mark.parametrize("seed", ["0", "3", "11"])
def test_cuda_topk_divergence_does_not_depend_on_the_order_of_threads(seed, gpu, monkeypatch):
    logits, ids = torch.randn(2, 2500), topk_rows.ids_of(2, 2500, 300, 5)
    law = Law(None, None, [1.0, 4.0, 0.7], 2500)
    grads = torch.randn(2, 300), torch.randn(2)

    def run():
        rows = gpu.ops.topk_divergence_fwd(logits, ids, *law)
        return *rows, gpu.ops.topk_divergence_bwd(logits, ids, *grads, rows[2], *law)

    expected = run()
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    for one, two in zip(run(), expected, strict=True):
        assert torch.equal(one, two)
