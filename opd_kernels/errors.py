# SPDX-License-Identifier: Apache-2.0
"""Exceptions of this package; each is also the builtin that a caller would catch."""

from __future__ import annotations


class OpdError(Exception):
    """Base of every error that this project raises on purpose."""


class UnsupportedBackendError(OpdError, NotImplementedError):
    """A backend was asked for that cannot run this call; the message says why."""


class AlignmentError(OpdError, ValueError):
    """Two token sequences that should have the same bytes have not; the message says where."""


class BuildError(OpdError, ImportError):
    """The compiled library is missing or does not load; the message says how to build it."""


class TokenBytesError(OpdError, ValueError):
    """A tokenizer's bytes cannot be recovered, or a text has no tokens; the message says which."""
