# SPDX-License-Identifier: Apache-2.0
"""Whole or absent, whatever happens in between."""

from __future__ import annotations

import errno
import os

import pytest

from opd.store import files


def test_a_file_is_written_whole_and_nothing_else(tmp_path):
    assert files.write_atomically(tmp_path / "a", b"x" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"x" * 100_000
    assert files.write_atomically(tmp_path / "a", b"y")
    assert not files.write_atomically(tmp_path / "a", b"z", replace=False)
    assert (tmp_path / "a").read_bytes() == b"y"
    assert files.write_atomically(tmp_path / "b", b"z", replace=False)
    assert files.partials(tmp_path) == []


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, call):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda where, data: write(where, data[:3]))
    files.write_atomically(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path):
    (tmp_path / ".partial-dead-x").write_bytes(b"half")
    descriptor, partial = files._open_partial(tmp_path / "y")
    assert files.remove_dead_partials(tmp_path) == 1
    assert files.partials(tmp_path) == [partial]
    os.close(descriptor)
    assert files.remove_dead_partials(tmp_path) == 1


def test_a_writer_whose_file_is_taken_for_a_dead_ones_takes_another(tmp_path, monkeypatch):
    """Somebody sweeps up between the writer's open and its lock."""
    lock, swept = files._lock, []

    def late(descriptor):
        if not swept:
            (path,) = files.partials(tmp_path)
            other = os.open(path, os.O_WRONLY)
            assert lock(other)
            swept.append((other, path))
        return lock(descriptor)

    monkeypatch.setattr(files, "_lock", late)
    descriptor, partial = files._open_partial(tmp_path / "y")
    other, path = swept[0]
    path.unlink()
    os.close(other)
    assert files.partials(tmp_path) == [partial]
    os.close(descriptor)


def test_without_locks_everything_is_written_and_nothing_swept_up(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / ".partial-dead-x").write_bytes(b"half")
    assert files.write_atomically(tmp_path / "a", b"x")
    assert files.remove_dead_partials(tmp_path) == 0
