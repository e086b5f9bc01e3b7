# SPDX-License-Identifier: Apache-2.0
"""The Triton token_logprobs kernels under the interpreter, by the public op and the raw ops."""

from __future__ import annotations

import pytest

from tests import twins
from tests.twins.token_logprobs import (  # noqa: F401
    test_fused_linear_token_logprobs_of_a_bent_head_matches_reference,
    test_token_logprobs_at_a_temperature,
    test_token_logprobs_bwd_in_place_is_bwd,
    test_token_logprobs_compiles_without_a_graph_break,
    test_token_logprobs_matches_reference,
    test_token_logprobs_of_an_id_out_of_range_is_nan,
    test_token_logprobs_opcheck,
    test_token_logprobs_refuses_float64_in_words,
    test_token_logprobs_with_options_matches_reference,
    token_logprobs,
)

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture
def gpu(interpreted_triton):
    return twins.triton()
