# SPDX-License-Identifier: Apache-2.0
"""What a shard is made of, and that every number of its index is checked."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd.store import StoreError
from opd.store.shard import Shard, _index_checksum, _metadata
from tests.opd.store.conftest import fill


@pytest.fixture
def path(store):
    """A shard of three records."""
    fill(store, [3, 5, 9])
    return next(store.path.glob("shard-*"))


def rewrite(path, manifest, change, **metadata):
    """The shard with other tensors and checksums that fit them, as a liar would write it."""
    tensors = load_file(path)
    change(tensors)
    values = {**_metadata(manifest), **metadata}
    values["checksum"] = _index_checksum(values, tensors)
    path.unlink()
    save_file(tensors, path, metadata=values)


def set_item(name, place, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][place] = value

    return change


def replace(name, make):
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_item("prompt_offsets", 1, 1 << 40), "prompt_offsets are none"),
        (set_item("completion_offsets", 1, -1), "completion_offsets are none"),
        (set_item("completion_offsets", 0, 1), "completion_offsets are none"),
        (
            set_item("completion_offsets", slice(1, 3), [9 * 10**18, -9 * 10**18]),
            "completion_offsets are none",
        ),
        (set_item("completion_offsets", -1, 1 << 40), "has the shape"),
        (replace("completion_offsets", lambda a: a[:-1]), "completion_offsets are none"),
        (replace("codes", lambda a: a[:-1]), "codes has the shape"),
        (replace("codes", lambda a: np.ascontiguousarray(a[:, :-4])), "codes has the shape"),
        (replace("entropy", lambda a: a[:1]), "entropy has the shape"),
        (replace("prompt_ids", lambda a: a.astype(np.int64)), "prompt_ids is I64"),
        (replace("keys", lambda a: a[:, :8].copy()), "keys has the shape"),
        (lambda tensors: tensors.pop("entropy"), "its tensors are"),
    ],
)
def test_lengths_are_checked_before_use(store, path, change, words):
    rewrite(path, store.manifest, change)
    with pytest.raises(StoreError, match=words):
        Shard(path, store.manifest)


def test_a_record_under_another_key_is_no_record(store, path):
    def change(tensors):
        tensors["keys"] = tensors["keys"][[1, 0, 2]]
        tensors["checksums"] = tensors["checksums"][[1, 0, 2]]

    rewrite(path, store.manifest, change)
    with pytest.raises(StoreError, match="record 0 of the shard"):
        Shard(path, store.manifest).record(0)


def test_other_versions_and_formats_are_named(store, path):
    rewrite(path, store.manifest, lambda tensors: None, version="2")
    with pytest.raises(StoreError, match="of version '2', and this opd reads 1"):
        Shard(path, store.manifest)
    rewrite(path, store.manifest, lambda tensors: None, format="weights")
    with pytest.raises(StoreError, match="not a shard"):
        Shard(path, store.manifest)


def test_sizes_are_those_of_the_page(store, path):
    shard = Shard(path, store.manifest)
    assert (len(shard), shard.num_tokens) == (3, 3 + 5 + 2)
    codes = shard.num_tokens * store.manifest.form.row_bytes(store.manifest.vocab_size)
    assert codes < path.stat().st_size < codes + 2500
