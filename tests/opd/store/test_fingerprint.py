# SPDX-License-Identifier: Apache-2.0
"""A fingerprint changes with whatever changes the laws, and with nothing else."""

from __future__ import annotations

import torch

from opd.store import fingerprint_of


def test_fingerprint_is_of_the_weights_and_not_of_the_name(hf_model, tokenizer):
    one = fingerprint_of(hf_model(seed=1), tokenizer, name="a")
    same = fingerprint_of(hf_model(seed=1), tokenizer, name="b")
    assert one.digest() == same.digest()
    assert one.differences(same) == []
    other = fingerprint_of(hf_model(seed=2), tokenizer, name="a")
    assert one.digest() != other.digest()
    assert "the weights" in one.differences(other)[0]


def test_fingerprint_is_of_dtype_temperature_shape_and_tokens(hf_model, tokenizer):
    one = fingerprint_of(hf_model(seed=1), tokenizer, name="a")
    half = fingerprint_of(hf_model(seed=1).to(torch.bfloat16), tokenizer, name="a")
    warm = fingerprint_of(hf_model(seed=1), tokenizer, name="a", temperature=2.0)
    wide = fingerprint_of(hf_model(seed=1, hidden_size=32), tokenizer, name="a")

    class Other:
        def get_vocab(self):
            return {**tokenizer.get_vocab(), "one more": 45}

    words = fingerprint_of(hf_model(seed=1), Other(), name="a")
    assert len({found.digest() for found in (one, half, warm, wide, words)}) == 5
    assert "the temperature (2.0 there, 1.0 here)" in one.differences(warm)
    assert "the tokenizer" in one.differences(words)[0]
