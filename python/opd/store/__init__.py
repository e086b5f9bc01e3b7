# SPDX-License-Identifier: Apache-2.0
"""What a teacher said, kept on disk: compressed top-k laws of completions, found by their ids."""

from opd.store.files import StoreError
from opd.store.fingerprint import TeacherFingerprint, fingerprint_of
from opd.store.shard import TopkRecord
from opd.store.teacher_store import TeacherStore
from opd.store.verify import verify
from opd.store.writer import StoreWriter

__all__ = [
    "StoreError",
    "StoreWriter",
    "TeacherFingerprint",
    "TeacherStore",
    "TopkRecord",
    "fingerprint_of",
    "verify",
]
