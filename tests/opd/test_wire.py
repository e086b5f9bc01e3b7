# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import struct
import zlib

import pytest
import torch
from safetensors.torch import load, save

from opd.wire import FRAME, MAGIC, WireError, pack, unpack

TENSORS = {
    "ids": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "hidden": torch.randn(2, 4).bfloat16(),
    "half": torch.ones(1, dtype=torch.float16),
    "none": torch.empty(0, 5),
}


def frame(body: bytes) -> bytes:
    return FRAME.pack(MAGIC, 1, zlib.crc32(body), len(body)) + body


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def aligned(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return safetensors(text + b" " * (-len(text) % 8), data)


META = {"__metadata__": {"opd": "{}"}}
I32 = {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}


def test_what_goes_in_comes_out():
    message = unpack(pack(TENSORS, {"a": 1, "text": "é", "none": None}))
    assert message.meta == {"a": 1, "text": "é", "none": None}
    assert message.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(message.tensors[name], tensor)
        assert message.tensors[name].dtype == tensor.dtype


def test_the_library_of_safetensors_reads_what_is_written_and_writes_what_is_read():
    data = pack(TENSORS, {"a": 1})
    for name, tensor in load(data[FRAME.size :]).items():
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype
    message = unpack(frame(save(TENSORS, metadata={"opd": "{}"})))
    assert message.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(message.tensors[name], TENSORS[name]) for name in TENSORS)


def test_parts_are_joined():
    parts = [torch.arange(6).reshape(3, 2)[:, :1], torch.empty(0, 1).long(), torch.tensor([[7]])]
    message = unpack(pack({"x": parts, "y": [torch.empty(0, 3)] * 2}, {}))
    assert message.tensors["x"].tolist() == [[0], [2], [4], [7]]
    assert message.tensors["y"].shape == (0, 3)


def test_tensors_are_views_of_a_bytearray_and_never_of_bytes():
    data = pack({"a": torch.zeros(2, dtype=torch.int32)}, {})
    unpack(data).tensors["a"].fill_(-1)
    assert data == pack({"a": torch.zeros(2, dtype=torch.int32)}, {})
    body = bytearray(data)
    unpack(body).tensors["a"].fill_(-1)
    assert body.endswith(b"\xff" * 8)


def test_the_bytes_are_those_of_the_page():
    data = pack({"a": torch.tensor([1, -1], dtype=torch.int32)}, {})
    assert data[:8] == b"OPDWIRE\0"
    assert struct.unpack("<IIQ", data[8:24]) == (1, zlib.crc32(data[24:]), len(data) - 24)
    (length,) = struct.unpack("<Q", data[24:32])
    header = json.loads(data[32 : 32 + length])
    assert header["a"] == {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}
    assert header["__metadata__"] == {"opd": "{}"}
    assert data[32 + length :] == struct.pack("<ii", 1, -1)


def test_every_flipped_bit_is_seen():
    data = pack({"a": torch.arange(8, dtype=torch.int32)}, {"k": 1})
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpack(bytes(bad))


def test_every_cut_is_seen():
    data = pack({"a": torch.arange(8, dtype=torch.int32)}, {"k": 1})
    for length in range(len(data)):
        with pytest.raises(WireError):
            unpack(data[:length])
    with pytest.raises(WireError, match="cut short"):
        unpack(data + b"x")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 1 << 60),
        safetensors(b"[" * 100_000),
        safetensors({}),
        safetensors({"__metadata__": {"opd": "[1]"}}),
        safetensors({"__metadata__": {"opd": "{"}}),
        safetensors({"__metadata__": {"opd": "[" * 100_000}}),
        safetensors({"__metadata__": {"other": "{}"}}),
        safetensors({"a": {"dtype": "I32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"abcd"),
        safetensors({"a": {"dtype": "I32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}, b""),
        safetensors({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"abcd"),
        safetensors({"a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}, b"abcdefgh"),
        safetensors({"a": {"dtype": "I32", "shape": [-1], "data_offsets": [0, 4]}}, b"abcd"),
        *(
            aligned({**META, "a": entry}, b"abcdefgh")
            for entry in (
                None,
                {},
                {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]},
                {"dtype": "I32", "shape": [1], "data_offsets": [4, 8]},
                {"dtype": "I32", "shape": [True, 2], "data_offsets": [0, 8]},
                {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]},
                {"dtype": "I32", "shape": [2.0], "data_offsets": [0, 8]},
                {"dtype": "I32", "shape": "", "data_offsets": [0, 4]},
                {"dtype": "I32", "shape": [1 << 62, 0], "data_offsets": [0, 0]},
                {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]},
                {"dtype": [], "shape": [2], "data_offsets": [0, 8]},
                {"dtype": "I32", "shape": [1] * 9, "data_offsets": [0, 4]},
                {"dtype": "I32", "shape": [1 << 62] * 50_000, "data_offsets": [0, 8]},
                {"dtype": "x" * 500_000, "shape": [2], "data_offsets": [0, 8]},
            )
        ),
        # tensors that lie upon each other, leave a gap, are not aligned, and a header that is not
        aligned({**META, "a": I32, "b": I32}, b"abcd"),
        aligned({**META, "a": I32, "b": {**I32, "data_offsets": [8, 12]}}, b"abcdefghabcd"),
        aligned(
            {
                **META,
                "a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
                "b": {**I32, "data_offsets": [2, 6]},
            },
            b"abcdef",
        ),
        safetensors(json.dumps({**META, "a": I32}).encode() + b" " * 7, b"abcd"),
    ],
)
def test_well_framed_nonsense_is_refused(body):
    with pytest.raises(WireError, match=r"body is not what opd writes|metadata must be"):
        unpack(frame(body))


def test_a_header_beyond_its_limit_and_long_words_are_refused_in_few():
    wide = aligned({**META, "a" * (2 << 20): I32}, b"abcd")
    with pytest.raises(WireError, match="header cannot have") as told:
        unpack(frame(wide))
    assert len(str(told.value)) < 300
    with pytest.raises(WireError) as told:
        unpack(frame(aligned({**META, "a": {**I32, "dtype": "x" * 500_000}}, b"abcd")))
    assert len(str(told.value)) < 300


def test_other_versions_and_no_frames_are_told_apart():
    body = pack({}, {})[24:]
    with pytest.raises(WireError, match="has version 2"):
        unpack(FRAME.pack(MAGIC, 2, zlib.crc32(body), len(body)) + body)
    with pytest.raises(WireError, match="begins with"):
        unpack(b"<html>" + b" " * 100)


def test_take_says_what_was_expected():
    message = unpack(pack(TENSORS, {}))
    assert message.take("ids", torch.int32, (2, None)).shape == (2, 3)
    with pytest.raises(WireError, match=r"must be torch.int32 of shape \[3xany\], got.*\[2x3\]"):
        message.take("ids", torch.int32, (3, None))
    with pytest.raises(WireError, match="'other' is missing, the message has half, hidden"):
        message.take("other", torch.int32, ())
