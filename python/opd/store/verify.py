# SPDX-License-Identifier: Apache-2.0
"""Reads all of a store, and says what it is and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opd.store.files import StoreError, partials
from opd.store.manifest import Manifest, read_manifest
from opd.store.shard import PATTERN, Shard


@dataclass(slots=True)
class Findings:
    """Of a store that has been read.

    Attributes:
        manifest: what it holds.
        num_shards, num_records, num_tokens, num_bytes: that are there, damaged ones included where
            they can be counted.
        num_keys: different keys.
        unfinished: files that somebody is writing, or was when killed.
        damage: a sentence for each shard and record that is not as it was written.
    """

    manifest: Manifest
    num_shards: int = 0
    num_records: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_keys: int = 0
    unfinished: int = 0
    damage: list[str] = field(default_factory=list)


def verify(
    path: str | Path,
    *,
    records: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Read a store whole.

    Args:
        path: of its directory.
        records: also decode every record; else only what finds them is read.
        progress: is told the shards read and those there are.

    Raises:
        StoreError: there is no store, or its store.json is damaged.
    """
    path = Path(path)
    found = Findings(read_manifest(path))
    found.unfinished = len(partials(path))
    keys: list[np.ndarray] = []
    paths = sorted(path.glob(PATTERN))
    for number, file in enumerate(paths):
        if progress is not None:
            progress(number, len(paths))
        found.num_shards += 1
        try:
            found.num_bytes += file.stat().st_size
            shard = Shard(file, found.manifest)
        except (StoreError, OSError) as error:
            found.damage.append(str(error))
            continue
        found.num_records += len(shard)
        found.num_tokens += shard.num_tokens
        keys.append(shard.keys)
        for record in range(len(shard) if records else 0):
            try:
                shard.record(record)
            except StoreError as error:
                found.damage.append(str(error))
    if keys:
        found.num_keys = len(np.unique(np.concatenate(keys), axis=0))
    if progress is not None:
        progress(len(paths), len(paths))
    return found
