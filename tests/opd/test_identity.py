# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from opd.identity import first_difference, hash_parts, model_fingerprint, tokenizer_hash


class _Words:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_a_tokenizer_is_its_pairs():
    assert tokenizer_hash(_Words("a", "b")) == tokenizer_hash(_Words("a", "b"))
    assert tokenizer_hash(_Words("a", "b")) != tokenizer_hash(_Words("b", "a"))
    assert tokenizer_hash(_Words("a", "b")) != tokenizer_hash(_Words("a", "b", "c"))
    assert len(tokenizer_hash(_Words())) == 32


def test_tokens_that_no_law_is_about_do_not_matter():
    short, long = _Words("a", "b"), _Words("a", "b", "c")
    assert tokenizer_hash(short, 2) == tokenizer_hash(long, 2) == tokenizer_hash(short)
    assert tokenizer_hash(short, 3) != tokenizer_hash(long, 3)
    assert first_difference(short, long, 2) is None
    words = "token 2 is none there and 'c' for the student (vocab_size=2 leaves out"
    assert words in first_difference(short, long, 3)
    words = "token 1 is 'b' there and 'c' for the student"
    assert first_difference(_Words("a", "b"), _Words("a", "c")) == words


def test_parts_are_told_apart():
    assert hash_parts(b"ab", b"c") != hash_parts(b"a", b"bc")
    assert len(hash_parts()) == 16


def test_a_fingerprint_changes_with_any_weight_of_a_small_model(hf_model):
    model = hf_model(seed=1)
    first = model_fingerprint(model)
    assert first == model_fingerprint(hf_model(seed=1)) != model_fingerprint(hf_model(seed=2))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        second = model_fingerprint(model)
        assert second != first
        first = second
    assert model_fingerprint(model.bfloat16()) != first


def test_large_weights_are_sampled_all_over():
    model = torch.nn.Linear(1 << 12, 1 << 10, bias=False)
    first = model_fingerprint(model)
    with torch.no_grad():
        model.weight[600:700] += 1
    assert model_fingerprint(model) != first
