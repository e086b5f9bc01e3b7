# SPDX-License-Identifier: Apache-2.0
"""verify finds all damage, not only the first."""

from __future__ import annotations

from opd.store import verify
from tests.opd.store.conftest import fill


def test_verify_finds_all_damage(store):
    for number in (3, 4, 5, 6):
        fill(store, [number, number + 7])
    paths = sorted(store.path.glob("shard-*"))
    for path, place in ((paths[0], -1), (paths[1], 40)):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.unlink()
        path.write_bytes(bytes(data))
    paths[2].write_bytes(b"")
    (store.path / ".partial-x").write_bytes(b"half")
    seen = []
    found = verify(store.path, progress=lambda done, all: seen.append((done, all)))
    assert len(found.damage) == 3
    assert all(str(path) in line for path, line in zip(paths, found.damage, strict=False))
    assert (found.num_shards, found.unfinished) == (4, 1)
    assert seen[0] == (0, 4) and seen[-1] == (4, 4)


def test_verify_without_records_reads_only_the_index(store):
    fill(store, range(1, 10))
    found = verify(store.path, records=False)
    assert (found.num_records, found.num_keys, found.damage) == (9, 9, [])
    assert found.num_tokens == sum(number % 7 for number in range(1, 10))
    assert found.num_bytes == sum(p.stat().st_size for p in store.path.glob("shard-*"))
