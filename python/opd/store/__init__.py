# SPDX-License-Identifier: Apache-2.0
"""What a teacher said, kept on disk: compressed laws of completions, found by their ids."""

from opd.store.files import StoreError
from opd.store.fingerprint import TeacherFingerprint, fingerprint_of
from opd.store.forms import DrawsForm, TopkForm
from opd.store.shard import DrawsRecord, TopkRecord
from opd.store.teacher_store import TeacherStore
from opd.store.verify import verify
from opd.store.writer import StoreWriter

__all__ = [
    "DrawsForm",
    "DrawsRecord",
    "StoreError",
    "StoreWriter",
    "TeacherFingerprint",
    "TeacherStore",
    "TopkForm",
    "TopkRecord",
    "fingerprint_of",
    "verify",
]
