# SPDX-License-Identifier: Apache-2.0
"""A model that reads sequences of different lengths piece by piece, and can take tokens back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd.model import PROBE_TOLERANCE, LanguageModel
from opd.schema import ConfigError

_log = logging.getLogger(__name__)


class CachedReader:
    """Hidden states of the newest tokens of B sequences; those before them come from a KV cache.

    Each row holds its own tokens and nothing else, right-aligned: slot j of W is a token of row b
    if j >= W - length[b]. So what the model sees is ordinary left padding; tokens that are next
    to each other are in adjacent slots, which sliding windows and ALiBi count; and the cache is
    never wider than the longest row. Rows that lose different numbers of tokens are moved by one
    copy per layer; keys carry their rotation with them, so that moving them changes nothing.

    Args:
        model: in eval mode.
        num_rows: B.
        keeps_cache: False reads every sequence from its start each time: for models whose state
            cannot be taken back by a token.
    """

    def __init__(self, model: LanguageModel, num_rows: int, *, keeps_cache: bool = True) -> None:
        from transformers import DynamicCache

        self._model = model
        # without a configuration every layer keeps all its tokens, also one with a sliding window
        self._cache = DynamicCache() if keeps_cache else None
        self._slots = 0
        self._lengths = torch.zeros(num_rows, dtype=torch.int64)
        # tokens of each row, those read again included
        self.num_read = torch.zeros(num_rows, dtype=torch.int64)

    def read(
        self, tokens: Tensor, ends: Tensor, num_states: int = 1, *, owned: Tensor | None = None
    ) -> Tensor:
        """Hidden states at the last `num_states` tokens of each row. [B, num_states, D].

        Args:
            tokens: [B, M] int64, each row's sequence from its first token, on the model's device.
            ends: [B] int64 on the CPU, >= 1; row b's sequence is tokens[b, :ends[b]]. It may be
                shorter than the last one; its tokens before the last `num_states` are as they
                were when they were read.
            num_states: >= 1. Places before a row's first token hold numbers without meaning.
            owned: [B] int64 on the CPU, <= ends, >= 1: what a row has beyond so many tokens is
                read, all at the place of the last of them, so that the row grows like the others
                and no cache is moved. Its states have no meaning, and the next read forgets it.
        """
        owned = ends if owned is None else owned
        kept = torch.minimum(self._lengths, (ends - num_states).clamp_min(0))
        # one width for all rows: some read a few tokens again
        width = int((ends - kept).max())
        kept = (ends - width).clamp_min(0)
        self._align(kept)
        slots = int(kept.max()) + width
        # one copy to the device: each waits for what runs there
        device = tokens.device
        both = torch.stack([ends, owned]).to(device)
        ends_there, owned_there = both[..., None]
        place = (torch.arange(width, device=device) + ends_there - width).clamp_min(0)
        mask = torch.arange(slots, device=device) >= slots - ends_there
        position = torch.minimum(place, owned_there - 1)
        states = self._model.states(tokens.gather(1, place), mask.long(), position, self._cache)
        self.num_read = self.num_read + (owned - kept).clamp_min(0)
        if self._cache is not None:
            self._lengths, self._slots = ends.clone(), slots
        return states[:, width - num_states :].to(self._model.lm_head_weight.dtype)

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some of the sequences: indices, on the CPU."""
        self._lengths, self.num_read = self._lengths[rows], self.num_read[rows]
        for layer in self._layers():
            rows = rows.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def split(self, rows: Tensor) -> CachedReader:
        """A reader of some of the sequences, which has read what this one has; its `num_read` is
        0. Indices, on the CPU."""
        part = copy.copy(self)
        if self._cache is not None:
            part._cache = copy.copy(self._cache)
            part._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        part.keep_rows(rows)
        part.num_read = torch.zeros_like(part.num_read)
        part._align(part._lengths)
        part._slots = int(part._lengths.max())
        return part

    def join(self, others: Sequence[CachedReader]) -> None:
        """Take in the sequences of others, behind its own. They are used up."""
        readers = [self, *others]
        self._slots = max(reader._slots for reader in readers)
        for layers in zip(*(reader._layers() for reader in readers), strict=True):
            for name in ("keys", "values"):
                parts = [getattr(layer, name) for layer in layers]
                missing = (self._slots - part.shape[2] for part in parts)
                padded = [
                    pad(part, (0, 0, more, 0)) for part, more in zip(parts, missing, strict=True)
                ]
                setattr(layers[0], name, torch.cat(padded))
                for layer in layers[1:]:
                    setattr(layer, name, None)
        self._lengths = torch.cat([reader._lengths for reader in readers])
        self.num_read = torch.cat([reader.num_read for reader in readers])

    def _align(self, kept: Tensor) -> None:
        """Let each row be its first kept[b] tokens, at the right edge of the narrowest cache."""
        width, dropped = int(kept.max()), self._lengths - kept
        if width == self._slots and not dropped.any():
            return
        # in slots of the old cache; what is left of a row's first token the mask hides
        starts = self._slots - dropped - width
        is_slice = bool((starts == starts[0]).all())
        first = int(starts[0])
        slots = (torch.arange(width) + starts[:, None]).clamp_min(0)[:, None]
        for layer in self._layers():
            # once for each device that has layers
            slots = slots if is_slice else slots.to(layer.keys.device)
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old[:, :, first : first + width] if is_slice else _picked(old, slots)
                setattr(layer, name, new)

    def _layers(self) -> list[Any]:
        layers = [] if self._cache is None else self._cache.layers
        return [layer for layer in layers if layer.is_initialized]


def _picked(cache: Tensor, slots: Tensor) -> Tensor:
    """[B, H, W', D], slots [B, 1, W'] of a cache [B, H, W, D]; whole rows of D are copied, which is
    several times as fast as a gather of numbers."""
    num_rows, num_heads, width, size = cache.shape
    starts = width * torch.arange(num_rows * num_heads, device=cache.device)
    index = (starts.view(num_rows, num_heads, 1) + slots).flatten()
    picked = cache.reshape(-1, size).index_select(0, index)
    return picked.view(num_rows, num_heads, slots.shape[2], size)


def can_take_back(model: LanguageModel) -> bool:
    """Whether a model's KV cache forgets single tokens exactly, tried on a few real ones.

    Returns:
        False, with a warning, for a model that must read its sequences again for every token:
        one with a recurrent state (Mamba, Qwen3-Next), or a cache of its own kind.

    Raises:
        torch.OutOfMemoryError: the few tokens do not fit.
        ConfigError: even that gives other hidden states than each sequence by itself.
    """
    cause = ""
    for keeps_cache in (True, False):
        try:
            error = _probe_error(model, keeps_cache)
        except torch.OutOfMemoryError:
            # which says nothing of the cache
            raise
        except Exception as failure:
            # a cache that is none of ours fails in the model's own code, each in its own way
            if not keeps_cache:
                raise
            cause = f"{type(failure).__name__}: {failure}"
            continue
        if keeps_cache:
            cause = f"its hidden states are then off by {error:.2g} of the largest"
        if error <= PROBE_TOLERANCE.get(model.lm_head_weight.dtype, 1e-4):
            break
    else:
        raise ConfigError(
            f"{model.name}: {type(model.model).__name__} has hidden states that are off by "
            f"{error:.2g} of the largest when it reads sequences of different lengths together, "
            "padded on the left, so two models cannot write with it token by token"
        )
    if not keeps_cache:
        _log.warning(
            "%s: the state of %s cannot be taken back by a token (%s), so it reads each sequence "
            "anew for every token, which is slow",
            model.name,
            type(model.model).__name__,
            cause,
        )
    return keeps_cache


@torch.no_grad()
def _probe_error(model: LanguageModel, keeps_cache: bool) -> float:
    """The largest difference of hidden states, relative to the largest of them."""
    sequences = torch.tensor([[3, 1, 4, 1, 5, 0], [2, 7, 1, 8, 2, 5]]) % len(model.lm_head_weight)
    sequences = sequences.to(model.device)
    lengths = torch.tensor([5, 6])
    # from the fourth token on
    wrong = torch.cat([sequences[:, :3], sequences.flip(0)[:, 3:]], dim=1)
    with reading(model):
        alone = torch.stack(
            [_last_state(model, row[:n]) for row, n in zip(sequences, lengths, strict=True)]
        )
        reader = CachedReader(model, len(lengths), keeps_cache=keeps_cache)
        reader.read(wrong, torch.tensor([3, 5]))
        reader.read(wrong, torch.tensor([4, 6]))
        # one token of the first row is taken back, three of the second
        reader.read(sequences, torch.tensor([4, 4]))
        together = reader.read(sequences, lengths)[:, 0]
    largest = alone.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = float((together.float() - alone).abs().max() / largest)
    return error if error == error else torch.inf


def _last_state(model: LanguageModel, sequence: Tensor) -> Tensor:
    ids = sequence[None]
    positions = torch.arange(len(sequence), device=ids.device)[None]
    return model.states(ids, torch.ones_like(ids), positions)[0, -1].float()


@contextmanager
def reading(*models: LanguageModel) -> Iterator[None]:
    """Eval mode meanwhile, in which also checkpointed layers keep a cache."""
    were_training = [model.model.training for model in models]
    for model in models:
        model.model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.model.train(was_training)


def right_padded(sequences: Sequence[Tensor], length: int, device: Any) -> Tensor:
    """[B, length] int64, zeros behind each sequence."""
    padded = torch.zeros(len(sequences), length, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return padded.to(device)
