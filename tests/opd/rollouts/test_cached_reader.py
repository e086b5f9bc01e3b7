# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import random

import pytest
import torch
from torch.overrides import TorchFunctionMode

from opd.model import LanguageModel
from opd.rollouts import cached_reader
from opd.rollouts.cached_reader import CachedReader, can_take_back, reading, right_padded
from opd.schema import ConfigError


def _alone(model, sequence):
    """[D], the last hidden state of one sequence without cache, padding or neighbours."""
    ids = sequence[None]
    return model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom"])
@torch.no_grad()
def test_rows_that_grow_shrink_and_leave_are_read_as_if_alone(family, family_model):
    model = LanguageModel(family_model(family, seed=3))
    rng, generator = random.Random(family), torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 45, (5, 28), generator=generator)
    ends = torch.tensor([1, 3, 8, 2, 5])
    reader = CachedReader(model, len(ends))
    reader.read(tokens, ends)
    for turn in range(10):
        # up to three tokens are taken back, one or more others are in their place
        kept = torch.tensor([max(1, int(end) - rng.randint(0, 3)) for end in ends])
        for row, start in enumerate(kept.tolist()):
            tokens[row, start:] = torch.randint(1, 45, (28 - start,), generator=generator)
        reader.read(tokens, (kept + 1).clamp(max=28))
        ends = (kept + torch.tensor([rng.randint(1, 4) for _ in kept])).clamp(max=28)
        num_states = rng.choice([1, 3])
        states = reader.read(tokens, ends, num_states)
        for row, end in enumerate(ends.tolist()):
            for place in range(min(num_states, end)):
                expected = _alone(model, tokens[row, : end - place])
                got = states[row, num_states - 1 - place]
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
        if turn in (4, 7):
            # also the longest row leaves
            rows = torch.tensor([r for r in range(len(ends)) if r != int(ends.argmax())])
            reader.keep_rows(rows)
            tokens, ends = tokens[rows], ends[rows]


@torch.no_grad()
def test_the_cache_is_as_wide_as_the_longest_row_and_nothing_is_read_twice(family_model):
    model = LanguageModel(family_model("llama", seed=3))
    reader = CachedReader(model, 2)
    tokens = torch.arange(1, 29).repeat(2, 1)
    reader.read(tokens, torch.tensor([4, 20]))
    reader.read(tokens, torch.tensor([5, 21]))
    assert reader.num_read.tolist() == [5, 21]
    reader.read(tokens, torch.tensor([5, 12]))
    assert reader.num_read.tolist() == [6, 22]
    assert {layer.keys.shape[2] for layer in reader._cache.layers} == {12}
    reader.keep_rows(torch.tensor([0]))
    reader.read(tokens[:1], torch.tensor([6]))
    assert {layer.keys.shape[2] for layer in reader._cache.layers} == {6}
    assert reader.num_read.tolist() == [7]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom"])
@torch.no_grad()
def test_split_and_joined_readers_go_on_without_reading_again(family, family_model):
    model = LanguageModel(family_model(family, seed=3))
    tokens = torch.randint(1, 45, (5, 28), generator=torch.Generator().manual_seed(5))
    ends = torch.tensor([9, 3, 12, 2, 5])
    reader = CachedReader(model, len(ends))
    reader.read(tokens, ends)
    rows = [torch.tensor(some) for some in ([4, 1], [0], [3])]
    first, *others = [reader.split(some) for some in rows]
    first.read(tokens[rows[0]], ends[rows[0]] + 1)
    first.join(others)
    order = torch.cat(rows)
    now = ends[order] + torch.tensor([2, 2, 1, 1])
    states = first.read(tokens[order], now)[:, 0]
    for row, (own, end) in enumerate(zip(order.tolist(), now.tolist(), strict=True)):
        expected = _alone(model, tokens[own, :end])
        torch.testing.assert_close(states[row], expected, rtol=1e-4, atol=2e-5)
    assert first.num_read.tolist() == [2, 2, 1, 1]
    # what they came from is as it was
    states = reader.read(tokens, ends + 1)[:, 0]
    expected = _alone(model, tokens[2, :13])
    torch.testing.assert_close(states[2], expected, rtol=1e-4, atol=2e-5)
    assert reader.num_read.tolist() == (ends + 1).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_what_a_row_does_not_own_moves_no_cache_and_is_forgotten(family, family_model, monkeypatch):
    model = LanguageModel(family_model(family, seed=3))
    tokens = torch.randint(1, 45, (2, 32), generator=torch.Generator().manual_seed(5))
    # the first row is full: the model has 28 positions
    ends, owned = torch.tensor([27, 6]), torch.tensor([28, 28])
    reader = CachedReader(model, 2)
    reader.read(tokens, ends)
    with monkeypatch.context() as context:
        context.setattr(cached_reader, "_picked", None)
        for _ in range(3):
            ends = ends + 1
            states = reader.read(tokens, ends, owned=torch.minimum(ends, owned))[:, 0]
            expected = _alone(model, tokens[1, : ends[1]])
            torch.testing.assert_close(states[1], expected, rtol=1e-4, atol=2e-5)
    tokens[:, 27:] = torch.flip(tokens, [1])[:, 27:]
    states = reader.read(tokens, torch.tensor([28, 10]))[:, 0]
    for row, end in enumerate((28, 10)):
        expected = _alone(model, tokens[row, :end])
        torch.testing.assert_close(states[row], expected, rtol=1e-4, atol=2e-5)


def test_rows_are_moved_by_one_copy_to_the_device_however_many_layers(family_model):
    class Copies(TorchFunctionMode):
        num = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.num += function is torch.Tensor.to and args[0].device.type == "cpu"
            return function(*args, **(kwargs or {}))

    model = LanguageModel(family_model("llama", seed=3, num_hidden_layers=4))
    reader = CachedReader(model, 2)
    tokens = torch.arange(1, 29).repeat(2, 1)
    with torch.no_grad():
        reader.read(tokens, torch.tensor([9, 9]))
    for layer in reader._cache.layers:
        # a device that is not the CPU, on every machine
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    with Copies() as copies:
        reader._align(torch.tensor([5, 8]))
        assert copies.num == 1
        reader.keep_rows(torch.tensor([1]))
        assert copies.num == 2
    assert {tuple(layer.values.shape[::2]) for layer in reader._cache.layers} == {(1, 8)}


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_cache_of_keys_and_values_can_take_tokens_back(family, family_model):
    assert can_take_back(LanguageModel(family_model(family, seed=3)))


def test_a_recurrent_model_reads_anew_and_says_so(family_model, caplog):
    model = LanguageModel(family_model("mamba", seed=3, state_size=4))
    with caplog.at_level(logging.WARNING):
        assert not can_take_back(model)
    assert "MambaForCausalLM cannot be taken back by a token" in caplog.text
    reader = CachedReader(model, 2, keeps_cache=False)
    tokens = torch.arange(1, 21).repeat(2, 1)
    with torch.no_grad():
        reader.read(tokens, torch.tensor([3, 9]))
        states = reader.read(tokens, torch.tensor([4, 8]))[:, 0]
        expected = torch.stack([_alone(model, tokens[0, :4]), _alone(model, tokens[1, :8])])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert reader.num_read.tolist() == [7, 17]


class _Failing(LanguageModel):
    """Fails wherever a cache is kept."""

    failure: Exception

    def states(self, input_ids, attention_mask, position_ids, cache=None):
        if cache is not None:
            raise self.failure
        return super().states(input_ids, attention_mask, position_ids, cache)


def test_why_a_state_cannot_be_taken_back_is_said(family_model, caplog):
    model = _Failing(family_model("llama", seed=3))
    model.failure = AttributeError("no crop in it")
    with caplog.at_level(logging.WARNING):
        assert not can_take_back(model)
    assert "taken back by a token (AttributeError: no crop in it), so it reads" in caplog.text


def test_out_of_memory_is_not_about_the_cache(family_model):
    model = _Failing(family_model("llama", seed=3))
    model.failure = torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        can_take_back(model)


def test_a_model_that_ignores_padding_is_refused(family_model):
    class Blind(LanguageModel):
        def states(self, input_ids, attention_mask, position_ids, cache=None):
            mask = torch.ones_like(attention_mask)
            return super().states(input_ids, mask, position_ids, cache)

    with pytest.raises(ConfigError, match="student: LlamaForCausalLM has hidden states that are"):
        can_take_back(Blind(family_model("llama", seed=3)))


def test_models_are_in_eval_mode_while_they_read(student, teacher):
    student.model.train()
    with pytest.raises(KeyError), reading(student, teacher):
        assert not student.model.training
        raise KeyError
    assert (student.model.training, teacher.model.training) == (True, False)


def test_right_padded_has_zeros_behind():
    padded = right_padded([torch.tensor([1, 2]), torch.tensor([3])], 3, "cpu")
    assert padded.tolist() == [[1, 2, 0], [3, 0, 0]]
