# SPDX-License-Identifier: Apache-2.0
"""The Triton topk_divergence kernels under the interpreter, by the public op and the raw ops."""

from __future__ import annotations

import pytest

from tests import twins
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

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf and log 0, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    # in the backward's pass over a row, at the ids, which are written after it
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture
def gpu(interpreted_triton):
    return twins.triton()
