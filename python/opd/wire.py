# SPDX-License-Identifier: Apache-2.0
"""The binary body of teacher requests and replies: a checked frame around safetensors.

All numbers are little-endian:

    offset  bytes  what
    0       8      magic, b"OPDWIRE" and a zero byte
    8       4      version, uint32, 1
    12      4      CRC-32 (that of zlib) of the body, uint32
    16      8      bytes of the body, uint64
    24             the body: a safetensors file, whose metadata has one key, "opd": a JSON object

Every bit of a frame is covered: by the magic, the version, the length or the checksum. The body
says dtype and shape of each tensor; safetensors checks that they fill it exactly. Which tensors a
message has: docs/teacher_server.md.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

MAGIC = b"OPDWIRE\0"
VERSION = 1
CONTENT_TYPE = "application/vnd.opd.wire"
FRAME = struct.Struct("<8sIIQ")
# the other form of a message, and the header that holds its checksum
JSON_TYPE = "application/json"
CRC_HEADER = "x-opd-crc32"
# of weights and hidden states
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEY = "opd"


class WireError(ValueError):
    """Bytes that are no message, or a message that is not the expected one."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a frame holds.

    Attributes:
        tensors: by name, on the CPU.
        meta: the JSON object of small values.
        crc32: of the body; a reply names its request by it.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    crc32: int

    def take(self, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
        """A tensor that must be there, with this dtype and shape; None is any size.

        Raises:
            WireError: it is not there, or is something else.
        """
        if name not in self.tensors:
            found = ", ".join(sorted(self.tensors)) or "none"
            raise WireError(f"tensor {name!r} is missing, the message has {found}")
        tensor = self.tensors[name]
        fits = len(tensor.shape) == len(shape) and all(
            want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            wanted = "x".join("any" if size is None else str(size) for size in shape)
            got = "x".join(map(str, tensor.shape))
            raise WireError(
                f"tensor {name!r} must be {dtype} of shape [{wanted}], got {tensor.dtype} [{got}]"
            )
        return tensor


def pack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """The frame of a message."""
    body = safetensors_torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={_KEY: json.dumps(dict(meta), allow_nan=False)},
    )
    return FRAME.pack(MAGIC, VERSION, zlib.crc32(body), len(body)) + body


def checksum_of(frame: bytes) -> int:
    """The checksum that a frame of `pack` holds, by which the reply names its request."""
    return FRAME.unpack_from(frame)[2]


def json_checksum(body: bytes) -> str:
    """What stands in CRC_HEADER beside a JSON body."""
    return f"{zlib.crc32(body):08x}"


def unpack(data: bytes | memoryview) -> Message:
    """The message of a frame.

    Raises:
        WireError: it is truncated, corrupted, of another version, or no frame at all.
    """
    view = memoryview(data)
    if len(view) < FRAME.size:
        raise WireError(f"a message has at least {FRAME.size} bytes, got {len(view)}")
    magic, version, checksum, length = FRAME.unpack_from(view)
    if magic != MAGIC:
        raise WireError(f"a message begins with {MAGIC!r}, got {bytes(magic)!r}")
    if version != VERSION:
        raise WireError(
            f"the message has version {version}, this is opd with version {VERSION}; client and "
            "server must be of one release"
        )
    body = view[FRAME.size :]
    if length != len(body):
        raise WireError(f"the message says {length} bytes and has {len(body)}; it was cut short")
    actual = zlib.crc32(body)
    if actual != checksum:
        raise WireError(
            f"the message has the checksum {actual:08x} and says {checksum:08x}; it was damaged "
            "on the way"
        )
    return _parse(bytes(body), checksum)


def _parse(body: bytes, checksum: int) -> Message:
    try:
        tensors = safetensors_torch.load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        meta = json.loads(header["__metadata__"][_KEY])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        # RecursionError is a RuntimeError
        raise WireError(f"the message's body is not what opd writes: {error!r}") from None
    if not isinstance(meta, dict):
        raise WireError(f"the message's metadata must be an object, got {type(meta).__name__}")
    return Message(tensors, meta, checksum)
