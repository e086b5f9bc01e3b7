# SPDX-License-Identifier: Apache-2.0
"""A directory of shards as a mapping from (prompt ids, completion ids) to the teacher's laws."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from opd.store.files import StoreError
from opd.store.fingerprint import TeacherFingerprint
from opd.store.forms import DrawsForm, TopkForm
from opd.store.manifest import NAME, Manifest, read_manifest
from opd.store.shard import PATTERN, Record, Shard, as_ids, record_key
from opd.store.writer import SHARD_BYTES, StoreWriter

# a directory's time of change is that of the last tick of the clock: an entry may have come since
_SAME_TICK_S = 2.0


class TeacherStore:
    """Compressed laws of one teacher, appended by any number of processes and read by any number.

    Shards that other processes add are seen by the next look-up that finds nothing, and by
    `refresh`. Make one with `create` or `open`; an object may be handed to worker processes.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shards: list[Shard] = []
        # sorted by key: the key as two words, and where the record is
        self._keys = np.zeros((0, 2), dtype=np.uint64)
        self._high = self._keys[:, 0]
        self._places = np.zeros((0, 2), dtype=np.int64)
        self._seen = (-1, 0.0)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        fingerprint: TeacherFingerprint,
        vocab_size: int,
        num_topk: int = 64,
        bits: int = 10,
        draws: DrawsForm | None = None,
    ) -> Self:
        """Make a store, or open the one that is there if it is of the same teacher.

        Args:
            path: of a directory, which is made.
            fingerprint: of the teacher.
            vocab_size: the laws are over ids in [0, vocab_size).
            num_topk: entries of a law, at most 4096.
            bits: of each log-prob, 4 to 16.
            draws: keep tokens drawn from the law, in the place of the likeliest.

        Raises:
            StoreError: the store that is there is of another teacher, size or form.
        """
        path = Path(path)
        form = draws or TopkForm(num_topk=num_topk, bits=bits)
        manifest = Manifest(fingerprint=fingerprint, vocab_size=vocab_size, form=form)
        try:
            form.check(vocab_size)
        except (TypeError, ValueError) as error:
            raise StoreError(f"cannot make the store '{path}': {error}") from None
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / NAME).is_file() or not manifest.write(path):
                manifest.refuse(path, read_manifest(path))
        except OSError as error:
            raise StoreError(f"cannot make the store '{path}': {error}") from None
        return cls(path, manifest)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        fingerprint: TeacherFingerprint | None = None,
        vocab_size: int | None = None,
    ) -> Self:
        """Open a store that is there.

        Args:
            path: of its directory.
            fingerprint: of the teacher whose laws are wanted. None: of any.
            vocab_size: that the laws must be over. None: any.

        Raises:
            StoreError: there is none, or it is of another teacher or vocabulary.
        """
        path = Path(path)
        manifest = read_manifest(path)
        wanted = Manifest(
            fingerprint=fingerprint or manifest.fingerprint,
            vocab_size=manifest.vocab_size if vocab_size is None else vocab_size,
            form=manifest.form,
        )
        wanted.refuse(path, manifest)
        return cls(path, manifest)

    def writer(self, *, shard_bytes: int = SHARD_BYTES) -> StoreWriter:
        """A context manager that appends records; see `StoreWriter`."""
        return StoreWriter(self.path, self.manifest, shard_bytes=shard_bytes)

    def get(self, prompt_ids: Tensor, completion_ids: Tensor) -> Record | None:
        """The laws of a completion; None if they are not there.

        Raises:
            StoreError: they are damaged.
        """
        place = self._find(prompt_ids, completion_ids)
        return None if place is None else self._shards[place[0]].record(place[1])

    def __getitem__(self, pair: tuple[Tensor, Tensor]) -> Record:
        record = self.get(*pair)
        if record is None:
            raise KeyError(f"no laws of this prompt and completion in '{self.path}'")
        return record

    def __contains__(self, pair: tuple[Tensor, Tensor]) -> bool:
        return self._find(*pair) is not None

    def __len__(self) -> int:
        """Different keys in it."""
        self.refresh()
        if len(self._keys) == 0:
            return 0
        return 1 + int(np.any(self._keys[1:] != self._keys[:-1], axis=1).sum())

    def __iter__(self) -> Iterator[Record]:
        """Every record once, in the order of the shards."""
        self.refresh()
        is_first = np.ones(len(self._keys), dtype=bool)
        is_first[1:] = np.any(self._keys[1:] != self._keys[:-1], axis=1)
        places = self._places[is_first]
        shards = list(self._shards)
        for shard, number in places[np.lexsort((places[:, 1], places[:, 0]))]:
            yield shards[shard].record(int(number))

    @property
    def num_shards(self) -> int:
        """Shards that are open."""
        return len(self._shards)

    def refresh(self) -> None:
        """Take note of shards that have come or gone.

        Raises:
            StoreError: one is damaged, or of another store.
        """
        try:
            changed = self.path.stat().st_mtime_ns
            seen, seen_at = self._seen
            if seen == changed and seen_at - changed / 1e9 > _SAME_TICK_S:
                return
            now = time.time()
            paths = sorted(self.path.glob(PATTERN))
        except OSError as error:
            raise StoreError(f"cannot read the store '{self.path}': {error}") from None
        known = {shard.path: shard for shard in self._shards}
        if set(known) != set(paths):
            self._index([known.get(path) or Shard(path, self.manifest) for path in paths])
        self._seen = (changed, now)

    def _index(self, shards: list[Shard]) -> None:
        keys = [np.zeros((0, 2), dtype=np.uint64)]
        places = [np.zeros((0, 2), dtype=np.int64)]
        for position, shard in enumerate(shards):
            keys.append(_words(shard.keys))
            numbers = np.arange(len(shard))
            places.append(np.stack([np.full_like(numbers, position), numbers], axis=1))
        all_keys, all_places = np.concatenate(keys), np.concatenate(places)
        # stable, so that of equal keys the oldest shard's comes first
        order = np.lexsort((all_keys[:, 1], all_keys[:, 0]))
        self._shards, self._keys, self._places = shards, all_keys[order], all_places[order]
        # searchsorted would copy a column of every row at each call
        self._high = np.ascontiguousarray(self._keys[:, 0])

    def key(self, prompt_ids: Tensor, completion_ids: Tensor) -> bytes:
        """16 bytes that stand for this teacher, prompt and completion."""
        prompt = as_ids("prompt_ids", prompt_ids)
        return record_key(self.manifest, prompt, as_ids("completion_ids", completion_ids))

    def _find(self, prompt_ids: Tensor, completion_ids: Tensor) -> tuple[int, int] | None:
        prompt = as_ids("prompt_ids", prompt_ids)
        completion = as_ids("completion_ids", completion_ids)
        key = record_key(self.manifest, prompt, completion)
        high, low = _words(np.frombuffer(key, dtype=np.uint8)[None])[0]
        for is_fresh in (False, True):
            if is_fresh:
                self.refresh()
            begin = int(np.searchsorted(self._high, high, side="left"))
            end = int(np.searchsorted(self._high, high, side="right"))
            for row in range(begin, end):
                if self._keys[row, 1] != low:
                    continue
                shard, number = (int(value) for value in self._places[row])
                if self._shards[shard].matches(number, prompt, completion):
                    return shard, number
        return None

    def __getstate__(self) -> dict[str, Any]:
        # another process maps the files itself
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["manifest"])


def _words(keys: np.ndarray) -> np.ndarray:
    """Keys [N, 16] uint8 as [N, 2] uint64."""
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
