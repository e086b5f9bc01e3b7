# SPDX-License-Identifier: Apache-2.0
"""Writers that are killed, run out of disk, or are many."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from opd.store import StoreError, TeacherStore, verify
from tests.opd.store.conftest import TOPK, VOCAB, check, create, fill, ids_of, laws_of

ROOT = Path(__file__).parents[3]


def test_append_refuses_what_is_no_law(store):
    ids, logprobs, tail, _ = laws_of(3)
    prompt, completion = ids_of(3)
    with store.writer() as writer:
        with pytest.raises(ValueError, match="one row for each of the 3 completion"):
            writer.append(prompt, completion, ids[:2], logprobs[:2], tail[:2])
        with pytest.raises(ValueError, match="at most 8 columns"):
            writer.append(prompt, completion, ids.repeat(1, 2), logprobs.repeat(1, 2), tail)
        with pytest.raises(ValueError, match="row 0 is none: an id is there twice"):
            writer.append(prompt, completion, torch.zeros_like(ids), logprobs, tail)
        with pytest.raises(ValueError, match="are these logits"):
            writer.append(prompt, completion, ids, logprobs + 20, tail)
        with pytest.raises(ValueError, match="entropy must have the shape"):
            writer.append(prompt, completion, ids, logprobs, tail, entropy=tail[:1])
        with pytest.raises(ValueError, match=r"completion_ids: must be in \[0, 2\^31\)"):
            writer.append(prompt, completion - 100, ids, logprobs, tail)
        with pytest.raises(TypeError, match="prompt_ids: must be int64"):
            writer.append(prompt.float(), completion, ids, logprobs, tail)
    assert len(store) == 0
    assert list(store.path.glob("shard-*")) == []


def test_fewer_entries_than_the_store_has_are_padded(store):
    ids, logprobs, _, _ = laws_of(3)
    with store.writer() as writer:
        writer.append(*ids_of(3), ids[:, :2], logprobs[:, :2], None)
    record = store[ids_of(3)]
    assert record.ids.shape == (3, TOPK)
    assert (record.ids[:, 2:] == -1).all() and (record.logprobs[:, 2:] == -torch.inf).all()
    outside = 1 - logprobs[:, :2].double().exp().sum(1)
    torch.testing.assert_close(record.tail_logprob, outside.log().float())


def test_what_is_whole_is_kept_when_the_body_fails(store):
    with pytest.raises(RuntimeError, match="something else"), store.writer() as writer:
        writer.append(*ids_of(3), *laws_of(3))
        raise RuntimeError("something else")
    check(store[ids_of(3)], 3)


def test_a_full_disk_loses_only_what_is_not_written(store, monkeypatch):
    fill(store, [3])
    write = os.write

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.writer() as writer:
        writer.append(*ids_of(4), *laws_of(4))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="No space left on device; make room, and run again"):
            writer.flush()
        assert verify(store.path).damage == []
        assert verify(store.path).unfinished == 0
        # there is room again: nothing was lost
        monkeypatch.setattr(os, "write", write)
    check(store[ids_of(3)], 3)
    check(store[ids_of(4)], 4)


def run(script, *arguments, **options):
    """A Python process that writes to a store."""
    source = "import sys\nfrom tests.opd.store.conftest import *\n" + textwrap.dedent(script)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_file_size_limit_is_a_full_disk(store):
    """The kernel refuses the write, half way through a shard."""
    script = """
        import resource
        from opd.store import StoreError
        store = create(sys.argv[1])
        fill(store, [3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            fill(store, range(4, 60))
        except StoreError as error:
            print(error)
    """
    process = run(script, store.path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "cannot write" in out and "File too large" in out
    found = verify(store.path)
    assert (found.num_records, found.damage, found.unfinished) == (1, [], 0)
    check(store[ids_of(3)], 3)


WRITER = """
    import itertools, signal
    # a shell that puts the tests in the background has them ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path, first, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = create(path)
    with store.writer(shard_bytes=20_000) as writer:
        for number in itertools.count(first, step):
            writer.append(*ids_of(number), *laws_of(number))
            if number == first:
                writer.flush()
                print("started", flush=True)
"""

READER = """
    import random, time
    from opd.store import TeacherStore
    path, seconds = sys.argv[1], float(sys.argv[2])
    store = TeacherStore.open(path)
    end, found, rng = time.monotonic() + seconds, 0, random.Random()
    while time.monotonic() < end:
        number = rng.randrange(1, max(2, 2 * len(store)))
        record = store.get(*ids_of(number))
        if record is not None:
            check(record, number)
            found += 1
    print(found)
"""


@pytest.mark.parametrize(
    ("seconds", "num_readers"),
    [(1.5, 2), pytest.param(60.0, 8, marks=pytest.mark.slow)],
    ids=["seconds", "minute"],
)
def test_writers_and_readers_at_once_and_a_writer_killed(store, seconds, num_readers):
    writers = [run(WRITER, store.path, first, 2) for first in (1, 2)]
    for writer in writers:
        assert writer.stdout.readline() == "started\n"
    readers = [run(READER, store.path, seconds) for _ in range(num_readers)]
    time.sleep(seconds / 2)
    writers[0].send_signal(signal.SIGKILL)
    for reader in readers:
        out, err = reader.communicate(timeout=seconds + 120)
        assert reader.returncode == 0, err
        assert int(out) > 0
    writers[1].send_signal(signal.SIGINT)
    writers[1].communicate(timeout=60)
    writers[0].communicate(timeout=60)
    found = verify(store.path)
    assert found.damage == []
    assert found.num_records == found.num_keys > 0
    reader = TeacherStore.open(store.path)
    ids = [torch.cat([record.completion_ids, record.prompt_ids]) for record in reader]
    numbers = [int(one[0]) for one in ids]
    # of each writer, all up to some number and none after it
    for first in (1, 2):
        mine = sorted(number for number in numbers if number % 2 == first % 2)
        assert mine == list(range(first, mine[-1] + 2, 2))
    # the living one, interrupted, wrote all that it had; the killed one's half is swept up
    with reader.writer():
        pass
    assert verify(store.path).unfinished == 0
    assert store.manifest.vocab_size == VOCAB


@pytest.mark.parametrize("call", ["rename", "fsync", "write"])
def test_an_interrupted_write_is_tried_again_and_counts_once(store, monkeypatch, call):
    original, calls = getattr(os, call), 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        result = original(*arguments)
        if calls == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt), store.writer() as writer:
        writer.append(*ids_of(3), *laws_of(3))
        writer.flush()
    found = verify(store.path)
    assert (found.num_records, found.num_keys, found.damage) == (1, 1, [])


def test_two_writers_of_one_process_do_not_meet(store):
    with store.writer() as one, store.writer() as two:
        one.append(*ids_of(3), *laws_of(3))
        two.append(*ids_of(4), *laws_of(4))
        assert one.has_pending(*ids_of(3)) and not two.has_pending(*ids_of(3))
    assert len(store) == 2
    create(store.path)
