# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from opd.sparse_law import SparseLaw, TopkRows


def _rows(law, num_topk, token_ids=None):
    """Of a whole law [T, V] in log-probabilities."""
    logprobs, ids = law.topk(num_topk, dim=1)
    rest = law.scatter(1, ids, -math.inf).logsumexp(1)
    return TopkRows(
        ids=ids.int(),
        logprobs=logprobs,
        tail_logprob=rest,
        token_logprobs=None if token_ids is None else law.gather(1, token_ids),
    )


@pytest.fixture
def law():
    torch.manual_seed(0)
    return (3 * torch.randn(4, 11)).log_softmax(1)


@pytest.fixture
def asked():
    return []


@pytest.fixture
def sparse(law, asked):
    def ask(num_topk, token_ids, temperature):
        asked.append((num_topk, token_ids))
        return _rows(law, num_topk, token_ids)

    return SparseLaw(ask, source="the server at nowhere", num_topk=5)


def test_the_best_of_more_are_the_best_of_fewer(law):
    few = _rows(law, 7).best(3)
    expected = _rows(law, 3)
    assert torch.equal(few.ids, expected.ids)
    assert torch.equal(few.logprobs, expected.logprobs)
    torch.testing.assert_close(few.tail_logprob, expected.tail_logprob)


def test_padding_adds_nothing_to_a_tail():
    rows = TopkRows(
        ids=torch.tensor([[4, 2, -1]]),
        logprobs=torch.tensor([[0.75, 0.25, 0.0]]).log(),
        tail_logprob=torch.tensor([-math.inf]),
    )
    assert rows.best(1).tail_logprob.exp().item() == pytest.approx(0.25)
    assert rows.best(2).tail_logprob.item() == -math.inf


def test_more_than_are_known_is_an_error(law):
    with pytest.raises(ValueError, match="at most the 3 that are known, got 4"):
        _rows(law, 3).best(4)


def test_asks_once_for_what_it_needs_twice(sparse, asked):
    sparse.prefetch(num_topk=5)
    assert torch.equal(sparse.topk(5).ids[:, :2], sparse.topk(2).ids)
    assert asked == [(5, None)]
    sparse.topk(6)
    assert len(asked) == 2


def test_chosen_tokens(law, sparse, asked):
    token_ids = torch.tensor([3, 0, 10, 7])
    sparse.prefetch(token_ids=token_ids)
    found = sparse.token_logprobs(token_ids).logprobs
    assert torch.equal(found, law[torch.arange(4), token_ids])
    assert len(asked) == 1
    again = sparse.token_logprobs(token_ids.clone()).logprobs
    assert torch.equal(again, found)


def test_has_no_hidden_states_and_one_temperature(sparse):
    with pytest.raises(ValueError, match=r"the server at nowhere reports .* and no hidden states"):
        sparse.hidden()
    with pytest.raises(ValueError, match=r"at temperature 1, got temperature 0\.7"):
        sparse.topk(2, temperature=0.7)


def test_a_source_without_chosen_tokens_says_so(law):
    sparse = SparseLaw(lambda k, ids, _: _rows(law, k), source="the store at x", num_topk=5)
    with pytest.raises(ValueError, match="the store at x has no log-probabilities of chosen"):
        sparse.token_logprobs(torch.zeros(4, dtype=torch.int64))
