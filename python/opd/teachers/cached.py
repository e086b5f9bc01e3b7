# SPDX-License-Identifier: Apache-2.0
"""A teacher that has spoken already: its laws come out of a store that `opd cache build` filled."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from opd.batch import Batch
from opd.schema import ConfigError, Section
from opd.sparse_law import DrawnLaw, DrawnRows, SparseLaw, TopkRows, gather_rows
from opd.store import DrawsForm, DrawsRecord, StoreError, TeacherStore, TopkRecord


class CachedConfig(Section):
    """Laws from disk; no teacher is loaded.

    Attributes:
        path: of the store.
    """

    # one of them: which one is checked when the store is open
    tells: ClassVar[frozenset[str]] = frozenset({"topk", "samples"})
    # at the one that the store was built at, which is checked when it is open
    takes_temperature: ClassVar[bool] = True

    kind: Literal["cached"] = "cached"
    path: str

    def build(
        self, tokenizer: Any, *, device: str, vocab_size: int | None, workspace_bytes: int
    ) -> CachedTeacher:
        """Open the store.

        Raises:
            StoreError: there is none.
        """
        return CachedTeacher(TeacherStore.open(self.path, vocab_size=vocab_size), device=device)


class CachedTeacher:
    """Laws as a store has them.

    Args:
        store: of the completions that are trained.
        device: where the laws are wanted.
    """

    name = "teacher"
    # only those that it was asked about
    judges_any_state: ClassVar[bool] = False
    num_parameters: ClassVar[int] = 0
    max_positions: ClassVar[int | None] = None

    def __init__(self, store: TeacherStore, *, device: str = "cpu") -> None:
        from opd.model import resolve_device

        self.store = store
        self._device = resolve_device(device)

    @property
    def fingerprint(self) -> str:
        """Of the weights whose laws these are."""
        return self.store.manifest.fingerprint.weights_hash

    @property
    def tells(self) -> frozenset[str]:
        """What the store holds."""
        return frozenset({self.store.manifest.form.tells})

    @property
    def drawn_with(self) -> dict[str, float]:
        """What a store of draws binds the objective to, by the names that it has there."""
        form = self.store.manifest.form
        names = ("num_draws", "proposal_temperature") if isinstance(form, DrawsForm) else ()
        return {name: getattr(form, name) for name in names}

    @property
    def temperature(self) -> float:
        """That the store's laws are at."""
        return self.store.manifest.fingerprint.temperature

    def check_fits(self, student: Any, tokenizer: Any) -> None:
        """Compare the store's vocabulary with the student's.

        Raises:
            ConfigError: they differ in size or in tokens.
        """
        from opd.identity import tokenizer_hash

        size, rows = self.store.manifest.vocab_size, student.lm_head_weight.shape[0]
        theirs = self.store.manifest.fingerprint.tokenizer_hash
        ours = tokenizer_hash(tokenizer, size)
        if theirs != ours:
            raise ConfigError(
                f"teacher.path: the store '{self.store.path}' is of a tokenizer whose first {size} "
                f"tokens have the hash {theirs} and the student's have {ours}; token-by-token "
                "losses need one vocabulary"
            )
        wanted = student.vocab_size or rows
        if size != wanted:
            raise ConfigError(
                f"teacher.path: the laws in '{self.store.path}' are over {size} tokens and the "
                f"student's over {wanted}; set vocab_size={min(size, rows)} if only the padding "
                "differs, and build the store with it"
            )

    def law(self, batch: Batch) -> SparseLaw | DrawnLaw:
        """Its next-token law at the trained positions, read when first asked for."""
        form, source = self.store.manifest.form, f"the store '{self.store.path}'"
        if isinstance(form, DrawsForm):
            return DrawnLaw(
                lambda: self._draws(batch),
                source=source,
                **self.drawn_with,
                temperature=self.temperature,
            )
        return SparseLaw(
            lambda num_topk, token_ids, temperature: self._topk(batch, num_topk, form.num_topk),
            source=source,
            num_topk=form.num_topk,
            temperature=self.temperature,
        )

    def _topk(self, batch: Batch, num_topk: int, known: int) -> TopkRows:
        if num_topk > known:
            raise ConfigError(
                f"objective.teacher_top_k: must be at most the {known} that the store "
                f"'{self.store.path}' has of every law, got {num_topk}"
            )
        names = ("ids", "logprobs", "tail_logprob", "entropy")
        rows = gather_rows(self._records(batch), batch.completion_rows(), names)
        return TopkRows(**rows).to(self._device)

    def _draws(self, batch: Batch) -> DrawnRows:
        records = self._records(batch)
        width = max(record.ids.shape[1] for record in records)
        pad = torch.nn.functional.pad
        records = [
            DrawnRows(
                ids=pad(record.ids, (0, width - record.ids.shape[1]), value=-1),
                weights=pad(record.weights, (0, width - record.ids.shape[1])),
                entropy=record.entropy,
            )
            for record in records
        ]
        rows = gather_rows(records, batch.completion_rows(), ("ids", "weights", "entropy"))
        return DrawnRows(**rows).to(self._device)

    def _records(self, batch: Batch) -> list[Any]:
        return [
            self._record(ids[:prompt_length], ids[prompt_length:])
            for ids, prompt_length in zip(batch.sequences(), batch.prompt_lengths, strict=True)
        ]

    def _record(
        self, prompt_ids: torch.Tensor, completion_ids: torch.Tensor
    ) -> TopkRecord | DrawsRecord:
        record = self.store.get(prompt_ids, completion_ids)
        if record is None:
            raise StoreError(
                f"the store '{self.store.path}' has no laws of a prompt of {len(prompt_ids)} "
                f"tokens with a completion of {len(completion_ids)}; it has {len(self.store)} "
                "others. It must have been filled by `opd cache build` with this run's data, "
                "rollouts, seed and max_completion_length, and completions that the student "
                "samples while it trains are never in it: take rollouts.kind=dataset, or a teacher "
                "at hand"
            )
        return record
