# SPDX-License-Identifier: Apache-2.0
"""Results as the bodies of replies: binary frames, or JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from opd.server.engine import Rows
from opd.server.requests import RequestError, ScoreRequest
from opd.wire import CONTENT_TYPE, CRC_HEADER, JSON_TYPE, json_checksum, pack


def reply_body(
    request: ScoreRequest, results: list[Rows], fingerprint: str
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the reply to a request."""
    meta = {
        "signal": request.signal,
        "temperature": request.temperature,
        "vocab_size": request.vocab_size,
        "request_crc32": request.crc32,
        "fingerprint": fingerprint,
    }
    if not request.is_json:
        tensors = {name: [rows[name] for rows in results] for name in results[0]}
        return pack(tensors, meta), {"content-type": CONTENT_TYPE}
    if any(tensor.isnan().any() for rows in results for tensor in rows.values()):
        raise RequestError(
            422, "the model's law of these tokens is NaN, which JSON has no word for"
        )
    lists = [{name: _finite(rows[name]).tolist() for name in rows} for rows in results]
    return json_body({"meta": meta, "results": lists})


def json_body(value: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """JSON with a checksum in a header."""
    body = json.dumps(value, allow_nan=False).encode()
    return body, {"content-type": JSON_TYPE, CRC_HEADER: json_checksum(body)}


def _finite(tensor: Tensor) -> Tensor:
    """JSON has no infinity: the smallest float32 stands for -inf."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.masked_fill(tensor == -torch.inf, torch.finfo(torch.float32).min)
