# SPDX-License-Identifier: Apache-2.0
"""What comes back, for whom it does not, and what other processes see."""

from __future__ import annotations

import pickle
import random
import time
from dataclasses import replace

import pytest
import torch

from opd.store import StoreError, TeacherStore, shard, verify
from tests.opd.store.conftest import FINGERPRINT, VOCAB, check, create, fill, ids_of


def test_records_come_back(store):
    fill(store, range(1, 60), shard_bytes=2000)
    assert store.get(*ids_of(3)) is not None
    assert store.num_shards > 3
    for number in range(1, 60):
        check(store[ids_of(number)], number)
        assert ids_of(number) in store
    assert ids_of(61) not in store
    assert store.get(*ids_of(61)) is None
    with pytest.raises(KeyError, match="no laws of this prompt"):
        store[ids_of(61)]


def test_prompt_and_completion_are_told_apart(store):
    ids = torch.arange(6)
    numbers = torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]]), torch.tensor([-3.0])
    with store.writer() as writer:
        writer.append(ids[:5], ids[5:], *numbers)
    assert (ids[:5], ids[5:]) in store
    assert (ids[:4], ids[4:]) not in store
    assert (ids, ids[:0]) not in store


def test_equal_keys_count_once_and_the_first_is_taken(store):
    fill(store, [3, 3, 5])
    fill(store, [5, 6])
    assert len(store) == 3
    assert len(list(store)) == 3
    found = verify(store.path)
    assert (found.num_records, found.num_keys, found.damage) == (5, 3, [])


def test_keys_that_collide_are_told_apart_by_their_ids(store, monkeypatch):
    one_key = lambda manifest, prompt, completion: bytes(16)  # noqa: E731
    monkeypatch.setattr("opd.store.writer.record_key", one_key)
    monkeypatch.setattr("opd.store.teacher_store.record_key", one_key)
    monkeypatch.setattr(shard, "record_key", one_key)
    fill(store, [3, 4, 8])
    for number in (3, 4, 8):
        check(store[ids_of(number)], number)
    assert ids_of(9) not in store


def test_new_shards_are_picked_up_and_removed_ones_forgotten(store):
    reader = TeacherStore.open(store.path)
    assert len(reader) == 0
    for number in (3, 4, 5):
        fill(store, [number])
        check(reader[ids_of(number)], number)
    next(store.path.glob("shard-*")).unlink()
    reader.refresh()
    assert len(reader) == 2


def test_a_new_shard_in_the_same_tick_of_the_clock_is_seen(store, monkeypatch):
    fill(store, [3])
    assert len(store) == 1
    stat = store.path.stat()
    fill(store, [4])
    import os

    os.utime(store.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ids_of(4) in store


def test_a_store_goes_to_another_process(store):
    fill(store, [3])
    assert len(store) == 1
    copy = pickle.loads(pickle.dumps(store))
    check(copy[ids_of(3)], 3)


def test_iteration_gives_every_record(store):
    fill(store, range(1, 20), shard_bytes=1500)
    numbers = [int(r.completion_ids[0]) for r in store if len(r.completion_ids)]
    assert sorted(numbers) == [n for n in range(1, 20) if n % 7]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"fingerprint": replace(FINGERPRINT, weights_hash="99")},
            "weights (22 there, 99 here)",
        ),
        ({"fingerprint": replace(FINGERPRINT, tokenizer_hash="99")}, "the tokenizer"),
        ({"fingerprint": replace(FINGERPRINT, config_hash="99")}, "the model's configuration"),
        ({"fingerprint": replace(FINGERPRINT, temperature=2.0)}, "the temperature (1.0 there, 2.0"),
        ({"vocab_size": VOCAB + 1}, "vocab_size (1000 there, 1001 here)"),
        ({"num_topk": 9}, "the number of entries (8 there, 9 here)"),
        ({"bits": 9}, "the bits of a log-prob (8 there, 9 here)"),
    ],
)
def test_another_teacher_is_refused(store, changes, words):
    with pytest.raises(StoreError) as error:
        create(store.path, **changes)
    assert words in str(error.value)
    assert "some/teacher" in str(error.value)


def test_a_teacher_that_moved_is_the_same(store):
    fill(store, [3])
    moved = replace(FINGERPRINT, model="elsewhere")
    reader = TeacherStore.open(store.path, fingerprint=moved, vocab_size=VOCAB)
    check(reader[ids_of(3)], 3)


def test_open_refuses_what_is_not_wanted(store, tmp_path):
    with pytest.raises(StoreError, match="vocab_size"):
        TeacherStore.open(store.path, vocab_size=VOCAB - 1)
    with pytest.raises(StoreError, match="no teacher store at"):
        TeacherStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="num_topk must be in"):
        create(tmp_path / "other", num_topk=5000)


def test_a_shard_of_another_store_is_refused(store, tmp_path):
    other = create(tmp_path / "other", fingerprint=replace(FINGERPRINT, temperature=0.5))
    fill(other, [3])
    foreign = next(other.path.glob("shard-*"))
    foreign.rename(store.path / foreign.name)
    with pytest.raises(StoreError, match="is of another store: teacher is"):
        len(store)


# -- damage ----------------------------------------------------------------------------------------


def damaged(data, rng):
    """Bytes with a few bits flipped, cut, overwritten, or swapped."""
    data = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        begin = rng.randrange(len(data))
        end = min(len(data), begin + rng.randrange(1, 64))
        data[begin:end] = rng.randbytes(end - begin)
    elif kind == 2:
        data += rng.randbytes(rng.randrange(1, 20))
    elif kind == 3:
        # in the header, where the lengths are
        data[rng.randrange(min(len(data), 1200))] = rng.randrange(256)
    else:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def same(one, two):
    pairs = [(getattr(one, name), getattr(two, name)) for name in one.__slots__]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "rounds", [600, pytest.param(10_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_damage_gives_an_error_and_never_a_wrong_law(store, rounds):
    fill(store, [3, 5, 9])
    truth = {number: store[ids_of(number)] for number in (3, 5, 9)}
    path = next(store.path.glob("shard-*"))
    good, rng = path.read_bytes(), random.Random(rounds)
    errors = 0
    for _ in range(rounds):
        bad = damaged(good, rng)
        path.unlink()
        path.write_bytes(bad)
        reader, failed = TeacherStore.open(store.path), False
        for number, record in truth.items():
            try:
                found = reader.get(*ids_of(number))
            except StoreError as error:
                failed = True
                assert str(path) in str(error)
                continue
            assert found is not None and same(found, record)
        assert failed or bad == good or is_harmless(good, bad)
        errors += failed
        # verify finds what reading found, and does not stop at it
        if rng.randrange(20) == 0:
            assert bool(verify(store.path).damage) == failed
    assert errors > 0.9 * rounds


def is_harmless(good, bad):
    """Only the spaces that pad the header differ, or white space inside it."""
    length = int.from_bytes(good[:8], "little")
    return len(good) == len(bad) and good[8 + length :] == bad[8 + length :]


def test_damage_of_one_record_leaves_the_others(store):
    fill(store, [3, 5, 9])
    path = next(store.path.glob("shard-*"))
    data = bytearray(path.read_bytes())
    codes = store[ids_of(5)].ids.shape[0] * store.manifest.form.row_bytes(VOCAB)
    assert codes > 0
    # the last tensor but one is of codes; a byte in the middle of record 5's
    start = data.index(shard.Shard(path, store.manifest).packed(1).codes.tobytes())
    data[start + codes // 2] ^= 4
    path.unlink()
    path.write_bytes(bytes(data))
    reader = TeacherStore.open(store.path)
    for number in (3, 9):
        check(reader[ids_of(number)], number)
    with pytest.raises(StoreError, match=r"record 1 of the shard .* is damaged: its checksum"):
        reader[ids_of(5)]
    found = verify(store.path)
    assert len(found.damage) == 1 and "record 1" in found.damage[0]


def test_look_ups_are_quick(store):
    """No look-up reads what it does not need: a thousand take less than many seconds."""
    fill(store, range(1, 300), shard_bytes=4000)
    len(store)
    begin = time.perf_counter()
    for number in range(1, 300):
        assert ids_of(number) in store
    assert time.perf_counter() - begin < 10
