# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside, flushed, then given their name."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from opd.schema import ConfigError

_PARTIAL = ".partial-"


class StoreError(ConfigError):
    """A store that cannot be used as asked: what is wrong with it, and what to do, in words."""


def write_atomically(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Write a file so that a process killed at any moment leaves all of it or none.

    Args:
        path: in a directory that exists.
        data: the whole file.
        replace: False leaves a file that is there already.

    Returns:
        Whether the file is now this one.

    Raises:
        OSError: the disk is full, or cannot be written to; nothing is left behind.
    """
    descriptor, partial = _open_partial(path)
    try:
        try:
            view = memoryview(data)
            while len(view):
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            if replace:
                os.rename(partial, path)
            else:
                # unlike a rename, a link refuses a name that is taken
                os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
    finally:
        # with it goes the lock that says that somebody is writing this
        os.close(descriptor)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return True


def _open_partial(path: Path) -> tuple[int, Path]:
    while True:
        partial = path.with_name(f"{_PARTIAL}{secrets.token_hex(8)}-{path.name}")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if not _lock(descriptor) or os.fstat(descriptor).st_nlink > 0:
                return descriptor, partial
        except BlockingIOError:
            # whoever holds it is about to delete it
            pass
        # somebody took it for a dead one before it was locked
        os.close(descriptor)


def partials(directory: Path) -> list[Path]:
    """Files that are being written, or were when their process was killed."""
    return sorted(directory.glob(f"{_PARTIAL}*"))


def remove_dead_partials(directory: Path) -> int:
    """Delete what killed processes left half written; those of live ones are locked."""
    removed = 0
    for path in partials(directory):
        try:
            descriptor = os.open(path, os.O_WRONLY)
        except OSError:
            continue
        try:
            if _lock(descriptor):
                path.unlink(missing_ok=True)
                removed += 1
        except BlockingIOError:
            # it is being written
            continue
        finally:
            os.close(descriptor)
    return removed


def _lock(descriptor: int) -> bool:
    """Hold a file; False where the file system has no locks.

    Raises:
        BlockingIOError: somebody else holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
