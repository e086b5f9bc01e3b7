# SPDX-License-Identifier: Apache-2.0
"""Records into shards: encoded at once, kept in memory until there is a shard of them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import opd_kernels as opk
from opd.store.files import StoreError, remove_dead_partials
from opd.store.forms import DrawsForm, TopkForm
from opd.store.manifest import Manifest
from opd.store.shard import Packed, as_ids, record_key, shard_name, write_shard

_log = logging.getLogger(__name__)
SHARD_BYTES = 64 << 20


class StoreWriter:
    """A context manager that appends records; what is whole is written when it ends.

    Several writers may be at work on one store, in one process or many: each writes shards of its
    own. A process that is killed loses the records since its last shard, and no others.

    Args:
        path: of the store.
        manifest: of the store.
        shard_bytes: a shard is written when there is so much for it.
    """

    def __init__(self, path: Path, manifest: Manifest, *, shard_bytes: int = SHARD_BYTES) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes: must be at least 1, got {shard_bytes}")
        self.path = path
        self.manifest = manifest
        self.num_records = 0
        self.num_tokens = 0
        self._shard_bytes = shard_bytes
        self._pending: list[Packed] = []
        # the name and the records of a shard that is being written
        self._sealed: tuple[str, list[Packed]] | None = None
        self._pending_keys: set[bytes] = set()
        self.pending_bytes = 0
        remove_dead_partials(path)

    def append(
        self,
        prompt_ids: Tensor,
        completion_ids: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        tail_logprob: Tensor | None,
        entropy: Tensor | None = None,
    ) -> None:
        """Add the laws of one completion.

        Args:
            prompt_ids: [P] integers.
            completion_ids: [C] integers.
            ids: [C, K] integers, best first, K at most that of the store; -1 is none.
            logprobs: [C, K] floating, nats.
            tail_logprob: [C] floating, nats; None: log(1 - sum of the probabilities).
            entropy: [C] floating, nats, kept as float32.

        Raises:
            ValueError: shapes that do not fit each other, ids that are none, rows that are no laws.
            StoreError: a shard could not be written; its records are kept, and are tried again.
        """
        prompt = as_ids("prompt_ids", prompt_ids)
        completion = as_ids("completion_ids", completion_ids)
        form = self._form(TopkForm, "append")
        _check_rows("append", len(completion), entropy, ids=ids, logprobs=logprobs)
        ids, logprobs = _padded(ids.detach().cpu(), logprobs.detach().cpu(), form.num_topk)
        codes = opk.encode_topk(
            ids,
            logprobs,
            vocab_size=self.manifest.vocab_size,
            tail_logprob=None if tail_logprob is None else tail_logprob.detach().cpu(),
            bits=form.bits,
            backend="cpu",
        )
        self._add(prompt, completion, codes.codes.numpy(), entropy)

    def append_draws(
        self,
        prompt_ids: Tensor,
        completion_ids: Tensor,
        ids: Tensor,
        weights: Tensor,
        entropy: Tensor | None = None,
    ) -> None:
        """Add the draws from the laws of one completion, to a store of such.

        Args:
            prompt_ids: [P] integers.
            completion_ids: [C] integers.
            ids: [C, M] integers, each once per row, negative: none.
            weights: [C, M] floating, as `opd_kernels.sample_tokens` has them.
            entropy: [C] floating, nats, -sum weight log p, kept as float32.

        Raises:
            ValueError: shapes that do not fit each other, ids or weights that are none of the
                store's number of draws.
            StoreError: as `append`.
        """
        prompt = as_ids("prompt_ids", prompt_ids)
        completion = as_ids("completion_ids", completion_ids)
        form = self._form(DrawsForm, "append_draws")
        _check_rows("append_draws", len(completion), entropy, ids=ids, weights=weights)
        if ids.shape != weights.shape:
            raise ValueError(
                f"append_draws: ids and weights must have one shape, got {tuple(ids.shape)} and "
                f"{tuple(weights.shape)}."
            )
        try:
            codes = form.encode(
                ids.detach().cpu(), weights.detach().cpu(), self.manifest.vocab_size
            )
        except ValueError as error:
            raise ValueError(f"append_draws: {error}.") from None
        self._add(prompt, completion, codes, entropy)

    def _form(self, kind: type[Any], name: str) -> Any:
        form = self.manifest.form
        if not isinstance(form, kind):
            raise ValueError(
                f"{name}: must be for what the store keeps, {form.in_words()}; take "
                f"{'append' if isinstance(form, TopkForm) else 'append_draws'}."
            )
        return form

    def _add(
        self,
        prompt: np.ndarray,
        completion: np.ndarray,
        codes: np.ndarray,
        entropy: Tensor | None,
    ) -> None:
        packed = Packed(
            key=record_key(self.manifest, prompt, completion),
            prompt_ids=prompt,
            completion_ids=completion,
            codes=codes,
            entropy=None if entropy is None else entropy.detach().cpu().float().numpy().copy(),
        )
        self._pending.append(packed)
        self._pending_keys.add(packed.key)
        self.pending_bytes += packed.num_bytes
        self.num_records += 1
        self.num_tokens += len(completion)
        if self.pending_bytes >= self._shard_bytes:
            self.flush()

    def has_pending(self, prompt_ids: Tensor, completion_ids: Tensor) -> bool:
        """Whether such a record waits for its shard."""
        prompt = as_ids("prompt_ids", prompt_ids)
        completion = as_ids("completion_ids", completion_ids)
        return record_key(self.manifest, prompt, completion) in self._pending_keys

    def flush(self) -> Path | None:
        """Write what is pending as a shard; afterwards it survives everything but the disk.

        Raises:
            StoreError: it could not be written; nothing is lost, call it again.
        """
        shard = None
        while self._sealed is not None or self._pending:
            if self._sealed is None:
                # under this name for good: when a write is tried again after an interruption that
                # came too late to stop it, there are no two shards of the same records
                self._sealed, self._pending = (shard_name(), self._pending), []
            name, records = self._sealed
            try:
                shard = write_shard(self.path / name, self.manifest, records)
            except OSError as error:
                raise StoreError(
                    f"cannot write {self.pending_bytes:,} bytes to the store '{self.path}': "
                    f"{error.strerror or error}; make room, and run again. What was written before "
                    f"is whole, the {len(records) + len(self._pending)} records since are not "
                    "written"
                ) from error
            self._sealed = None
            self._pending_keys.difference_update(record.key for record in records)
            self.pending_bytes = sum(record.num_bytes for record in self._pending)
        return shard

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        except StoreError as failure:
            if error is None:
                raise
            # the first error is the one to see
            _log.warning("%s", failure)


def _check_rows(op: str, num_tokens: int, entropy: Tensor | None, **tables: Tensor) -> None:
    for name, value in tables.items():
        if value.dim() != 2 or len(value) != num_tokens:
            raise ValueError(
                f"{op}: {name} must have one row for each of the {num_tokens} completion tokens, "
                f"got shape {tuple(value.shape)}."
            )
    if entropy is not None and entropy.shape != (num_tokens,):
        raise ValueError(
            f"{op}: entropy must have the shape ({num_tokens},), got {tuple(entropy.shape)}."
        )


def _padded(ids: Tensor, logprobs: Tensor, num_topk: int) -> tuple[Tensor, Tensor]:
    missing = num_topk - ids.shape[1]
    if missing < 0 or ids.shape != logprobs.shape:
        raise ValueError(
            f"append: ids and logprobs must have one shape of at most {num_topk} columns, got "
            f"{tuple(ids.shape)} and {tuple(logprobs.shape)}."
        )
    pad = torch.nn.functional.pad
    return pad(ids, (0, missing), value=-1), pad(logprobs, (0, missing), value=-torch.inf)
