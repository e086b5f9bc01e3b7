# SPDX-License-Identifier: Apache-2.0
"""JSON off the wire, and the numbers in it."""

from __future__ import annotations

import json
from typing import Any

from opd.clients.protocol import BadReply
from opd.clients.transport import Damaged


def load_json(body: bytes, where: str) -> Any:
    """The value in a reply.

    Raises:
        Damaged: it is not JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where}: the reply is not JSON, {error}") from None


def read_json(body: bytes, where: str) -> dict[str, Any]:
    """The object in a reply.

    Raises:
        Damaged: it is not JSON. BadReply: it is no object.
    """
    found = load_json(body, where)
    if not isinstance(found, dict):
        raise BadReply(f"{where}: the reply must be an object, got {type(found).__name__}")
    return found


def read_number(value: Any, where: str) -> float:
    """A float off the wire; true and text are none."""
    if type(value) not in (int, float):
        raise BadReply(f"{where}: a log-probability must be a number, got {value!r:.50}")
    try:
        return float(value)
    except OverflowError:
        raise BadReply(f"{where}: a log-probability has no float") from None
