# SPDX-License-Identifier: Apache-2.0
"""A shard: a safetensors file of records, with a checksum of each and one of what finds them.

docs/teacher_store.md has the tensors. Nothing that is read is used before it is checked.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import opd_kernels as opk
from opd.identity import HASH_BYTES, hash_parts
from opd.store.files import StoreError, write_atomically
from opd.store.forms import DrawsForm
from opd.store.manifest import Manifest

FORMAT, VERSION = "opd-teacher-shard", "1"
PATTERN = "shard-*.safetensors"
_MAX_ID = 2**31 - 1
_HAS_ENTROPY = 1
# what the checksum in the metadata is of, in this order; the last only where rows differ in length
_INDEX = ("keys", "flags", "prompt_offsets", "completion_offsets", "checksums", "code_offsets")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopkRecord:
    """The laws of one completion. Row t is that of its token t, given everything before it.

    Attributes:
        prompt_ids: [P] int64.
        completion_ids: [C] int64.
        ids: [C, K] int32, best first, -1 behind the last.
        logprobs: [C, K] float32, nats, as the codec gives them back.
        tail_logprob: [C] float32, nats, exact.
        entropy: [C] float32, nats, exact; or None.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    entropy: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawsRecord:
    """Tokens drawn from the laws of one completion, in a store of such.

    Attributes:
        prompt_ids: [P] int64.
        completion_ids: [C] int64.
        ids: [C, M] int32, each once per row, ascending, then -1; M: the most of a row.
        weights: [C, M] float32, the law on average, 0 beside -1; see `DrawsForm`.
        entropy: [C] float32, nats, -sum weight log p: the law's on average; or None.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    ids: Tensor
    weights: Tensor
    entropy: Tensor | None


Record = TopkRecord | DrawsRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A record as its bytes: prompt_ids [P] and completion_ids [C] int32, codes [C, row bytes]
    uint8 (of draws, [bytes]), entropy [C] float32 or None."""

    key: bytes
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    codes: np.ndarray
    entropy: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        """About what it takes in a shard."""
        extra = 0 if self.entropy is None else self.entropy.nbytes
        ids = self.prompt_ids.nbytes + self.completion_ids.nbytes
        return ids + self.codes.nbytes + extra + 2 * HASH_BYTES + 17

    @property
    def flags(self) -> int:
        """A bit for each part that a record may be without."""
        return 0 if self.entropy is None else _HAS_ENTROPY

    def checksum(self) -> bytes:
        """Of everything in it."""
        parts = [self.prompt_ids, self.completion_ids, self.codes]
        parts += [] if self.entropy is None else [self.entropy]
        return hash_parts(b"record", self.key, bytes([self.flags]), *(p.tobytes() for p in parts))


def record_key(manifest: Manifest, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """16 bytes that stand for (teacher, prompt, completion); ids are int32."""
    teacher = manifest.fingerprint.digest().encode()
    return hash_parts(b"key", teacher, prompt_ids.tobytes(), completion_ids.tobytes())


def as_ids(name: str, value: Tensor) -> np.ndarray:
    """[N] ids as int32.

    Raises:
        ValueError: another shape, or something that is no id. TypeError: no integers.
    """
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.int64)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: must be int64 or int32, got {value.dtype}.")
    if value.dim() != 1:
        raise ValueError(f"{name}: must have one dimension, got shape {tuple(value.shape)}.")
    if len(value) and not (int(value.min()) >= 0 and int(value.max()) <= _MAX_ID):
        raise ValueError(
            f"{name}: must be in [0, 2^31), got {int(value.min())} to {int(value.max())}."
        )
    return value.detach().cpu().numpy().astype(np.int32)


def shard_name() -> str:
    """Of a new shard: names ascend with time, and nobody else has this one."""
    return f"shard-{time.time_ns():020d}-{secrets.token_hex(8)}.safetensors"


def write_shard(path: Path, manifest: Manifest, records: Sequence[Packed]) -> Path:
    """Write records as a shard, whole or not at all.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    from safetensors.numpy import save

    def offsets(lengths: list[int]) -> np.ndarray:
        return np.cumsum([0, *lengths], dtype=np.int64)

    def table(rows: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, HASH_BYTES)

    entropies = [record.entropy for record in records if record.entropy is not None]
    tensors = {
        "keys": table([record.key for record in records]),
        "flags": np.array([record.flags for record in records], dtype=np.uint8),
        "prompt_offsets": offsets([len(record.prompt_ids) for record in records]),
        "completion_offsets": offsets([len(record.completion_ids) for record in records]),
        "checksums": table([record.checksum() for record in records]),
        "prompt_ids": np.concatenate([record.prompt_ids for record in records]),
        "completion_ids": np.concatenate([record.completion_ids for record in records]),
        "codes": np.concatenate([record.codes for record in records]),
        "entropy": np.concatenate([np.zeros(0, np.float32), *entropies]),
    }
    if isinstance(manifest.form, DrawsForm):
        tensors["code_offsets"] = offsets([len(record.codes) for record in records])
    metadata = _metadata(manifest)
    metadata["checksum"] = _index_checksum(metadata, tensors)
    write_atomically(path, save(tensors, metadata=metadata))
    return path


class Shard:
    """A shard that is read, mapped into memory; what finds its records has been checked.

    Args:
        path: of the file.
        manifest: of its store.

    Raises:
        StoreError: the file is damaged, truncated, no shard, or of another store.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._file = _open(path)
        try:
            self._check(self._file.metadata() or {})
        except StoreError:
            raise
        except Exception as error:
            # safetensors and numpy each have their own for bytes that make no sense
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        """Laws in it."""
        return int(self._completion_offsets[-1])

    def matches(self, number: int, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bool:
        """Whether the ids of a record are these, int32.

        Raises:
            StoreError: they are not, because the record is damaged.
        """
        prompt, completion = self._span(number)
        lengths = prompt[1] - prompt[0], completion[1] - completion[0]
        is_same = (
            lengths == (len(prompt_ids), len(completion_ids))
            and np.array_equal(self._rows("prompt_ids", prompt), prompt_ids)
            and np.array_equal(self._rows("completion_ids", completion), completion_ids)
        )
        if not is_same:
            # two pairs of one key are next to impossible: rather, these are not the ids it had
            self.packed(number)
        return is_same

    def record(self, number: int) -> Record:
        """A record, decoded.

        Raises:
            StoreError: it is not as it was written.
        """
        packed = self.packed(number)
        prompt_ids, completion_ids = (
            torch.from_numpy(ids.astype(np.int64))
            for ids in (packed.prompt_ids, packed.completion_ids)
        )
        entropy = None if packed.entropy is None else torch.from_numpy(packed.entropy)
        form, vocab_size = self.manifest.form, self.manifest.vocab_size
        if isinstance(form, DrawsForm):
            try:
                ids, weights = form.decode(packed.codes, len(completion_ids), vocab_size)
            except ValueError as error:
                raise self._damaged(f"its draws are none, {error}", number) from None
            return DrawsRecord(
                prompt_ids=prompt_ids,
                completion_ids=completion_ids,
                ids=ids,
                weights=weights,
                entropy=entropy,
            )
        codes = opk.TopkCodes(torch.from_numpy(packed.codes), form.num_topk, vocab_size, form.bits)
        laws = opk.decode_topk(codes, backend="cpu")
        wrong = laws.status.nonzero()
        if len(wrong):
            row = int(wrong[0])
            words = opk.codec_status(int(laws.status[row]))
            raise self._damaged(f"the law of token {row} is none, {words}", number)
        return TopkRecord(
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            ids=laws.ids,
            logprobs=laws.logprobs,
            tail_logprob=laws.tail_logprob,
            entropy=entropy,
        )

    def packed(self, number: int) -> Packed:
        """A record as its bytes, which its checksum fits.

        Raises:
            StoreError: it does not.
        """
        prompt, completion = self._span(number)
        has_entropy = bool(self._flags[number] & _HAS_ENTROPY)
        entropy = self._between(self._entropy_offsets, number)
        codes = completion
        if self._code_offsets is not None:
            codes = self._between(self._code_offsets, number)
        try:
            packed = Packed(
                key=self.keys[number].tobytes(),
                prompt_ids=self._rows("prompt_ids", prompt),
                completion_ids=self._rows("completion_ids", completion),
                codes=self._rows("codes", codes),
                entropy=self._rows("entropy", entropy) if has_entropy else None,
            )
        except Exception as error:
            raise self._damaged(f"{type(error).__name__}: {error}", number) from None
        if packed.checksum() != self._checksums[number].tobytes():
            raise self._damaged("its checksum does not fit", number)
        key = record_key(self.manifest, packed.prompt_ids, packed.completion_ids)
        if key != packed.key:
            raise self._damaged("its ids are not those of its key", number)
        return packed

    def _span(self, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (
            self._between(self._prompt_offsets, number),
            self._between(self._completion_offsets, number),
        )

    @staticmethod
    def _between(offsets: np.ndarray, number: int) -> tuple[int, int]:
        return int(offsets[number]), int(offsets[number + 1])

    def _rows(self, name: str, span: tuple[int, int]) -> np.ndarray:
        begin, end = span
        if begin == end:
            # safetensors refuses an empty slice
            shape = (0, *self._code_shape(0)[1:]) if name == "codes" else (0,)
            return np.zeros(shape, _DTYPES[name])
        return self._file.get_slice(name)[begin:end]

    def _check(self, metadata: dict[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            raise self._damaged("it is not a shard of a teacher store")
        if metadata.get("version") != VERSION:
            raise self._damaged(
                f"it is of version {metadata.get('version')!r}, and this opd reads {VERSION}"
            )
        names, index_names = set(self._file.keys()), _index_names(metadata)
        if names != set(_DTYPES) - set(_INDEX) | set(index_names):
            raise self._damaged(f"its tensors are {', '.join(sorted(names))}")
        shapes: dict[str, list[int]] = {}
        for name in names:
            found = self._file.get_slice(name)
            shapes[name] = list(found.get_shape())
            if found.get_dtype() != _NAMES[_DTYPES[name]]:
                raise self._damaged(f"{name} is {found.get_dtype()}")
        index = {name: self._file.get_tensor(name) for name in index_names}
        if metadata.get("checksum") != _index_checksum(metadata, index):
            raise self._damaged("the checksum of its index does not fit")
        expected = _metadata(self.manifest)
        for name, value in expected.items():
            if metadata.get(name) != value:
                raise StoreError(
                    f"the shard '{self.path}' is of another store: {name} is "
                    f"{metadata.get(name)!r} there and {value!r} here; move it away"
                )
        self._check_shapes(shapes, index)
        self.keys = index["keys"]
        self._flags, self._checksums = index["flags"], index["checksums"]
        self._prompt_offsets = index["prompt_offsets"]
        self._completion_offsets = index["completion_offsets"]
        self._code_offsets = index.get("code_offsets")
        self._entropy_offsets = _entropy_offsets(index)

    def _code_shape(self, num_rows: int) -> list[int]:
        """Of `codes` with that many laws or, of draws, bytes."""
        form = self.manifest.form
        if isinstance(form, DrawsForm):
            return [num_rows]
        return [num_rows, form.row_bytes(self.manifest.vocab_size)]

    def _check_shapes(self, shapes: dict[str, list[int]], index: dict[str, np.ndarray]) -> None:
        count = shapes["flags"][0] if len(shapes["flags"]) == 1 else -1
        totals = {}
        names = [name for name in index if name.endswith("_offsets")]
        for name in names:
            offsets = index[name]
            starts = offsets.shape == (count + 1,) and offsets[0] == 0
            # compared, not subtracted: a difference of what somebody made up may wrap around
            if not starts or not np.all(offsets[1:] >= offsets[:-1]):
                raise self._damaged(f"its {name} are none")
            totals[name] = int(offsets[-1])
        tokens = totals["completion_offsets"]
        entropies = int(_entropy_offsets(index)[-1])
        wanted = {
            "keys": [count, HASH_BYTES],
            "checksums": [count, HASH_BYTES],
            "prompt_ids": [totals["prompt_offsets"]],
            "completion_ids": [tokens],
            "codes": self._code_shape(totals.get("code_offsets", tokens)),
            "entropy": [entropies],
        }
        for name, shape in wanted.items():
            if shapes[name] != shape:
                raise self._damaged(f"{name} has the shape {shapes[name]}, not {shape}")

    def _damaged(self, why: str, number: int | None = None) -> StoreError:
        which = "the shard" if number is None else f"record {number} of the shard"
        return StoreError(
            f"{which} '{self.path}' is damaged: {why}; `opd cache verify` lists all damage, and "
            "without the file the store has all records but those in it"
        )


_DTYPES: dict[str, Any] = {
    "keys": np.uint8,
    "flags": np.uint8,
    "prompt_offsets": np.int64,
    "completion_offsets": np.int64,
    "code_offsets": np.int64,
    "checksums": np.uint8,
    "prompt_ids": np.int32,
    "completion_ids": np.int32,
    "codes": np.uint8,
    "entropy": np.float32,
}
_NAMES = {np.uint8: "U8", np.int64: "I64", np.int32: "I32", np.float32: "F32"}


def _open(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="np")
    except Exception as error:
        raise StoreError(
            f"the shard '{path}' is damaged: {type(error).__name__}: {error}; without the file the "
            "store has all records but those in it"
        ) from None


def _entropy_offsets(index: dict[str, np.ndarray]) -> np.ndarray:
    """Records without an entropy take no place in it."""
    lengths = np.diff(index["completion_offsets"]) * (index["flags"] & _HAS_ENTROPY)
    return np.concatenate([[0], np.cumsum(lengths)])


def _metadata(manifest: Manifest) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "teacher": manifest.fingerprint.digest(),
        "vocab_size": str(manifest.vocab_size),
        **{key: str(value) for key, value in asdict(manifest.form).items()},
    }


def _index_names(metadata: dict[str, str]) -> tuple[str, ...]:
    return _INDEX if "num_draws" in metadata else _INDEX[:-1]


def _index_checksum(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    values = sorted(item for item in metadata.items() if item[0] != "checksum")
    words = [f"{name}={value}".encode() for name, value in values]
    arrays = [tensors[name].tobytes() for name in _index_names(metadata)]
    return hash_parts(b"index", *words, *arrays).hex()
