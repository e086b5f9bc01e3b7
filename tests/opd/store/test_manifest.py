# SPDX-License-Identifier: Apache-2.0
"""store.json is checked before it is believed."""

from __future__ import annotations

import json
import random

import pytest

from opd.store import StoreError, TeacherStore
from opd.store.manifest import NAME, read_manifest
from tests.opd.store.conftest import create


def test_manifest_comes_back(store):
    assert read_manifest(store.path) == store.manifest
    assert create(store.path).manifest == store.manifest
    keys = {"format", "version", "fingerprint", "vocab_size", "num_topk", "bits", "checksum"}
    assert json.loads((store.path / NAME).read_text()).keys() == keys


def test_two_who_create_agree(tmp_path):
    one, two = create(tmp_path / "store"), create(tmp_path / "store")
    assert one.manifest == two.manifest
    assert not one.manifest.write(one.path)


def test_every_flipped_bit_is_refused_or_makes_no_difference(store):
    file = store.path / NAME
    good = file.read_bytes()
    rng = random.Random(0)
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(bad))
        try:
            found = read_manifest(store.path)
        except StoreError as error:
            assert NAME in str(error)
        else:
            assert found == store.manifest
    for cut in range(0, len(good), 7):
        file.write_bytes(good[:cut])
        with pytest.raises(StoreError, match="is damaged"):
            TeacherStore.open(store.path)


def test_another_version_is_refused_by_name(store):
    file = store.path / NAME
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(StoreError, match="is of version 2, and this opd reads 1"):
        read_manifest(store.path)
