# SPDX-License-Identifier: Apache-2.0
"""Draws as bytes: what comes back, what it costs, and what is refused."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

import opd_kernels as opk
from opd.store import DrawsForm, StoreError, TeacherStore, forms, verify
from opd.store.forms import TopkForm, parse_form
from tests.opd.store.conftest import create, ids_of, laws_of
from tests.opd.store.test_teacher_store import damaged, is_harmless, same

REAL_VOCAB = 151_936


def draws(form, *, num_tokens=5, vocab_size=300, seed=0):
    """ids, weights and entropies of as many draws as the form has."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, vocab_size, generator=generator)
    found = opk.sample_tokens(
        logits,
        torch.rand(num_tokens, form.num_draws, dtype=torch.float64, generator=generator),
        proposal_temperature=form.proposal_temperature,
    )
    entropy = -torch.where(found.weights > 0, found.weights * found.logprobs, 0.0).sum(1)
    return found.ids, found.weights, entropy


def dense(ids, weights, vocab_size=300):
    """Weights [T, V] of all tokens."""
    table = torch.zeros(len(ids), vocab_size)
    return table.scatter_add(1, ids.clamp_min(0).long(), weights.masked_fill(ids < 0, 0.0))


@pytest.mark.parametrize("num_draws", [1, 50, 4096])
def test_counts_come_back_exactly(num_draws):
    form = DrawsForm(num_draws=num_draws)
    ids, weights, _ = draws(form)
    found, theirs = form.decode(form.encode(ids, weights, 300), 5, 300)
    assert torch.equal(dense(found, theirs), dense(ids, weights))


@pytest.mark.parametrize("proposal_temperature", [0.7, 2.0, 1e6])
def test_other_weights_come_back_to_a_two_thousandth(proposal_temperature):
    form = DrawsForm(proposal_temperature=proposal_temperature)
    ids, weights, _ = draws(form, num_tokens=40)
    found, theirs = form.decode(form.encode(ids, weights, 300), 40, 300)
    ours, theirs = dense(ids, weights).double(), dense(found, theirs).double()
    assert torch.equal(ours > 0, theirs > 0)
    error = (theirs - ours).abs() / ours.clamp_min(1.3e-14)
    assert 1e-4 < error.max() < 4.9e-4


def test_bytes_are_those_of_the_page():
    assert DrawsForm(num_draws=50).entry_bytes(REAL_VOCAB) == 3
    assert DrawsForm(num_draws=64).entry_bytes(REAL_VOCAB) == 3
    assert DrawsForm(num_draws=65).entry_bytes(REAL_VOCAB) == 4
    assert DrawsForm(proposal_temperature=2.0).entry_bytes(REAL_VOCAB) == 5
    form = DrawsForm(num_draws=50)
    ids, weights, _ = draws(form, vocab_size=REAL_VOCAB)
    assert len(form.encode(ids, weights, REAL_VOCAB)) == 2 * 5 + 3 * int((ids >= 0).sum())


def test_laws_like_those_of_words_take_some_dozens_of_bytes():
    """z_v = -a log v with a from 1 to 3, as the page has it."""
    generator = torch.Generator().manual_seed(0)
    slopes = 1 + 2 * torch.rand(64, 1, generator=generator)
    logits = -slopes * torch.arange(1, REAL_VOCAB + 1).log()
    uniforms = torch.rand(64, 50, dtype=torch.float64, generator=generator)
    found = opk.sample_tokens(logits, uniforms)
    size = len(DrawsForm().encode(found.ids, found.weights, REAL_VOCAB)) / 64
    assert 35 < size < 50


def test_tokens_in_any_order_are_the_same_draws():
    form = DrawsForm(num_draws=4)
    one = form.encode(torch.tensor([[7, 2, -1]]), torch.tensor([[0.75, 0.25, 0.0]]), 10)
    two = form.encode(torch.tensor([[2, 7]]), torch.tensor([[0.25, 0.75]]), 10)
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("ids", "weights", "words"),
    [
        ([[3, 3]], [[0.5, 0.5]], "different in each row and below 10"),
        ([[3, 10]], [[0.5, 0.5]], "different in each row and below 10"),
        ([[-1, -1]], [[0.0, 0.0]], "1 to 4 in each row"),
        ([[0, 1, 2, 3, 4]], [[0.2] * 5], "1 to 4 in each row"),
        ([[3, 5]], [[0.5, 0.25]], "counts over the 4 draws"),
        ([[3, 5]], [[0.3, 0.7]], "counts over the 4 draws"),
        ([[3, 5]], [[float("nan"), 0.5]], "finite"),
    ],
)
def test_what_is_no_draws_is_refused(ids, weights, words):
    with pytest.raises(ValueError, match=words):
        DrawsForm(num_draws=4).encode(torch.tensor(ids), torch.tensor(weights), 10)


def test_a_weight_beyond_all_bounds_is_refused():
    form = DrawsForm(num_draws=4, proposal_temperature=0.5)
    with pytest.raises(ValueError, match=r"below e\^32, got 1e\+20"):
        form.encode(torch.tensor([[3]]), torch.tensor([[1e20]]), 10)


def test_forms_are_told_by_what_they_are_made_of():
    for form in (TopkForm(num_topk=3, bits=9), DrawsForm(num_draws=3, seed=5)):
        values = {name: getattr(form, name) for name in form.__slots__}
        assert parse_form(values) == form
    with pytest.raises(KeyError):
        parse_form({"num_draws": 3})
    for changes in ({"num_draws": 0}, {"num_draws": 4097}, {"seed": -1}, {"num_draws": 1.5}):
        with pytest.raises((ValueError, TypeError)):
            DrawsForm(**changes).check(300)
    with pytest.raises(ValueError, match="proposal_temperature"):
        DrawsForm(proposal_temperature=0.0).check(300)


def test_random_numbers_follow_from_the_seed_and_the_record_alone():
    form = DrawsForm(num_draws=3, seed=1)
    first = form.uniforms(b"a" * 16, 4)
    assert first.shape == (4, 3) and first.dtype == torch.float64
    assert torch.equal(first, form.uniforms(b"a" * 16, 4))
    assert not torch.equal(first, form.uniforms(b"b" * 16, 4))
    assert not torch.equal(first, DrawsForm(num_draws=3, seed=2).uniforms(b"a" * 16, 4))


def test_the_random_numbers_follow_from_all_of_the_hash(monkeypatch):
    """Two hashes that agree in their first 8 bytes, or only in the low half of them."""
    hashes = [b"\x01" + bytes(15), b"\x01" + bytes(4) + b"\x05" + bytes(10), b"\x01" * 9 + bytes(7)]
    hashes.append(b"\x01" * 8 + bytes(8))
    found = []
    for digest in hashes:
        monkeypatch.setattr(forms, "hash_parts", lambda *parts, digest=digest: digest)
        found.append(DrawsForm(num_draws=3).uniforms(b"", 4))
    assert all((a != b).any() for a, b in itertools.combinations(found, 2))


def test_the_random_numbers_stay_what_they_are():
    """A store is filled further by later releases."""
    found = DrawsForm(num_draws=2, seed=1).uniforms(b"a" * 16, 1)
    assert found.tolist() == [[0.8489828069292644, 0.2703113195966329]]


# -- stores of draws -------------------------------------------------------------------------------

FORM = DrawsForm(num_draws=20, seed=7)


@pytest.fixture
def drawn(tmp_path):
    """A store of draws of records 3, 5, 7 (whose completion is empty) and 9."""
    store = create(tmp_path / "drawn", draws=FORM)
    with store.writer() as writer:
        for number in (3, 5, 7, 9):
            ids, weights, entropy = draws(FORM, num_tokens=number % 7, seed=number)
            writer.append_draws(*ids_of(number), ids, weights, entropy if number != 5 else None)
    return store


def test_draws_come_back_from_a_store(drawn):
    reader = TeacherStore.open(drawn.path)
    assert reader.manifest.form == FORM
    for number in (3, 5, 7, 9):
        ids, weights, entropy = draws(FORM, num_tokens=number % 7, seed=number)
        record = reader[ids_of(number)]
        assert torch.equal(record.completion_ids, ids_of(number)[1])
        assert torch.equal(dense(record.ids, record.weights), dense(ids, weights))
        assert (record.entropy is None) == (number == 5)
        assert number == 5 or torch.equal(record.entropy, entropy)
    found = verify(drawn.path)
    assert (found.num_records, found.num_tokens, found.damage) == (4, 10, [])


def test_a_store_holds_one_form(drawn, store):
    with drawn.writer() as to_draws, store.writer() as to_topk:
        with pytest.raises(ValueError, match="append: must be for what the store keeps, 20 draws"):
            to_draws.append(*ids_of(4), *laws_of(4))
        with pytest.raises(ValueError, match="append_draws: must be for what the store keeps, the"):
            to_topk.append_draws(*ids_of(3), *draws(FORM, num_tokens=3))
        with pytest.raises(ValueError, match="append_draws: ids must have one row for each of the"):
            to_draws.append_draws(*ids_of(3), *draws(FORM, num_tokens=2))
    with pytest.raises(StoreError, match=r"what is kept of a law \(20 draws .* there, the 8 like"):
        create(drawn.path)
    with pytest.raises(StoreError, match=r"the seed of the draws \(7 there, 8 here\)"):
        create(drawn.path, draws=DrawsForm(num_draws=20, seed=8))


def test_damage_gives_an_error_and_never_other_draws(drawn):
    truth = {number: drawn[ids_of(number)] for number in (3, 5, 9)}
    path = next(drawn.path.glob("shard-*"))
    good, rng = path.read_bytes(), random.Random(1)
    errors = 0
    for _ in range(300):
        bad = damaged(good, rng)
        path.unlink()
        path.write_bytes(bad)
        reader, failed = TeacherStore.open(drawn.path), False
        for number, record in truth.items():
            try:
                found = reader.get(*ids_of(number))
            except StoreError:
                failed = True
                continue
            assert found is not None and same(found, record)
        assert failed or bad == good or is_harmless(good, bad)
        errors += failed
    assert errors > 270


def test_bytes_that_are_no_draws_are_refused_behind_any_checksum():
    ids, weights, _ = draws(FORM)
    codes = FORM.encode(ids, weights, 300)
    for place, value, words in (
        (0, 255, "bytes are no draws"),
        # the high bits of an id, or a count
        (11, 255, "beyond the vocabulary|sum to 20"),
        (10, codes[10] ^ 255, "do not ascend|beyond the vocabulary"),
    ):
        bad = codes.copy()
        bad[place] = value
        with pytest.raises(ValueError, match=words):
            FORM.decode(bad, 5, 300)
    with pytest.raises(ValueError, match="bytes are no draws"):
        FORM.decode(codes[:-1], 5, 300)
