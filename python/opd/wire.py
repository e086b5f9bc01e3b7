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
says dtype and shape of each tensor, and they fill it exactly. Which tensors a message has:
docs/teacher_server.md.

A reply has megabytes, and each copy of it costs as much as its checksum: a frame is joined from the
tensors' own memory in one go, and the tensors of a message are views of its bytes. The library of
safetensors copies on both sides, so its format is written and read here.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
_META = "__metadata__"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}
_LENGTH = struct.Struct("<Q")
# far beyond any message of ours; a parsed header takes 30 times its bytes
_MAX_HEADER_BYTES = 1 << 20
_MAX_DIMENSIONS = 8
# the tensors begin at a multiple of it, the wider dtypes first: each is aligned
_ALIGNMENT = 8


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


def pack(tensors: Mapping[str, Tensor | Sequence[Tensor]], meta: Mapping[str, Any]) -> bytes:
    """The frame of a message; several tensors of one name are joined along their first axis."""
    parts = {
        name: [tensors_of] if isinstance(tensors_of, Tensor) else tensors_of
        for name, tensors_of in tensors.items()
    }
    header: dict[str, Any] = {_META: {_KEY: json.dumps(dict(meta), allow_nan=False)}}
    chunks, end = [], 0
    for name, found in sorted(parts.items(), key=lambda item: -item[1][0].dtype.itemsize):
        begin = end
        for tensor in found:
            chunks.append(_bytes_of(tensor))
            end += chunks[-1].nbytes
        shape = [sum(tensor.shape[0] for tensor in found), *found[0].shape[1:]]
        header[name] = {
            "dtype": _NAMES[found[0].dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    chunks = [_LENGTH.pack(len(text)) + text, *chunks]
    checksum, length = 0, 0
    for chunk in chunks:
        checksum, length = zlib.crc32(chunk, checksum), length + len(chunk)
    return b"".join([FRAME.pack(MAGIC, VERSION, checksum, length), *chunks])


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)


def checksum_of(frame: bytes) -> int:
    """The checksum that a frame of `pack` holds, by which the reply names its request."""
    return FRAME.unpack_from(frame)[2]


def json_checksum(body: bytes) -> str:
    """What stands in CRC_HEADER beside a JSON body."""
    return f"{zlib.crc32(body):08x}"


def unpack(data: bytes | bytearray | memoryview) -> Message:
    """The message of a frame. Its tensors are views of a bytearray, which is theirs from then on.

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
    # tensors can be written to, so bytes that cannot are copied
    return _parse(memoryview(bytearray(body)) if body.readonly else body, checksum)


def _parse(body: memoryview, checksum: int) -> Message:
    try:
        header, data = _split(body)
        meta = json.loads(header.pop(_META)[_KEY])
        tensors, end = {}, 0
        # in the order of their bytes, each begins where the one before it ends
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name], end = _tensor(entry, data, end)
        if end != len(data):
            raise ValueError(f"its tensors have {end} bytes of {len(data)}")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        # RecursionError is a RuntimeError
        raise WireError(f"the message's body is not what opd writes: {error!r:.200}") from None
    if not isinstance(meta, dict):
        raise WireError(f"the message's metadata must be an object, got {type(meta).__name__}")
    return Message(tensors, meta, checksum)


def _split(body: memoryview) -> tuple[dict[str, Any], memoryview]:
    """Header and bytes of the tensors."""
    if len(body) < _LENGTH.size:
        raise ValueError(f"it has {len(body)} bytes")
    (length,) = _LENGTH.unpack_from(body)
    begin = _LENGTH.size + length
    if length > _MAX_HEADER_BYTES or begin > len(body) or begin % _ALIGNMENT:
        raise ValueError(f"its header cannot have {length} bytes")
    return json.loads(bytes(body[_LENGTH.size : begin])), body[begin:]


def _tensor(entry: dict[str, Any], data: memoryview, begin: int) -> tuple[Tensor, int]:
    """A tensor of the header, which must begin here, and where it ends."""
    dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
    # the product of many sizes is a number of any length
    is_shape = len(shape) <= _MAX_DIMENSIONS and all(
        type(size) is int and size >= 0 for size in shape
    )
    if not is_shape or begin % dtype.itemsize:
        raise ValueError(f"no tensor of {dtype} has the shape {shape!r:.100} at byte {begin}")
    count = math.prod(shape)
    end = begin + count * dtype.itemsize
    if entry["data_offsets"] != [begin, end] or end > len(data):
        raise ValueError(f"{dtype} {shape!r:.100} must be bytes {begin} to {end} of {len(data)}")
    if not count:
        return torch.empty(shape, dtype=dtype), end
    return torch.frombuffer(data, dtype=dtype, count=count, offset=begin).view(shape), end
