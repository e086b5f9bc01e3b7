# SPDX-License-Identifier: Apache-2.0
"""Short hashes: of bytes, and of tokenizers and models, to say whether two are the same one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

# of each weight: enough to tell checkpoints of one run apart, little enough to read at every start
_SAMPLED_BYTES = 1 << 20
_DIGITS = 32
HASH_BYTES = 16


def hash_bytes(data: bytes) -> bytes:
    """BLAKE2b-128, 16 bytes."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def hash_parts(*parts: bytes) -> bytes:
    """The same of several parts and where each ends, which stands before it in 8 bytes."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def vocabulary(tokenizer: Any, vocab_size: int | None = None) -> list[tuple[int, str]]:
    """The (id, token) pairs, added tokens included, that a law over `vocab_size` ids is about.

    Two tokenizers have one vocabulary where these are equal: what a teacher and a student call by
    ids that no law has does not matter, wherever the teacher is.
    """
    pairs = ((i, token) for token, i in tokenizer.get_vocab().items())
    return sorted(pair for pair in pairs if vocab_size is None or pair[0] < vocab_size)


def first_difference(theirs: Any, ours: Any, vocab_size: int | None = None) -> str | None:
    """The first id that two tokenizers differ in, in words; None where they have one vocabulary."""
    there, here = (dict(vocabulary(tokenizer, vocab_size)) for tokenizer in (theirs, ours))
    if there == here:
        return None
    i = min(i for i in there.keys() | here.keys() if there.get(i) != here.get(i))
    words = [repr(tokens[i]) if i in tokens else "none" for tokens in (there, here)]
    # where both have a token they are different tokenizers, and no size mends that
    one_sided = (i in there) != (i in here)
    hint = f" (vocab_size={i} leaves out all from there on)" if i and one_sided else ""
    return f"token {i} is {words[0]} there and {words[1]} for the student{hint}"


def tokenizer_hash(tokenizer: Any, vocab_size: int | None = None) -> str:
    """32 hex digits over the `vocabulary`."""
    pairs = vocabulary(tokenizer, vocab_size)
    text = json.dumps(pairs, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """32 hex digits over names, shapes, dtypes and a sample of every weight of a model.

    Of each weight at most 1 MiB is read, in equal steps over all of it; two models that differ
    only between these steps have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().flatten()
        most = max(1, _SAMPLED_BYTES // tensor.element_size())
        step = -(-flat.numel() // most) or 1
        sample = flat[::step].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]
