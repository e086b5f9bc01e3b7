# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers that agree on next to nothing, trained on the same text.

The teacher's: byte-level BPE with a GPT-2 splitter, no token that begins a text. The student's:
Unigram over characters with byte fallback and U+2581 for spaces, as SentencePiece has it, half the
size, with a token that begins every text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEACHER_SIZE, STUDENT_SIZE = 800, 480
SPACE = "▁"


def train_teacher_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE of `TEACHER_SIZE` tokens, as transformers wraps it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEACHER_SIZE,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )


def train_student_tokenizer(texts: Sequence[str]) -> Any:
    """Unigram of `STUDENT_SIZE` tokens with all 256 bytes, as transformers wraps it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.UnigramTrainer(
        vocab_size=STUDENT_SIZE - 256,
        special_tokens=specials,
        unk_token="<unk>",
        max_piece_length=8,
        show_progress=False,
    )
    # pieces do not run over lines
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines()), trainer)
    state = json.loads(tokenizer.to_str())
    pieces = state["model"]["vocab"]
    # far below every piece, so that bytes are only what no piece spells
    score = min(score for _, score in pieces if math.isfinite(score)) - 10.0
    fallback = [[f"<0x{byte:02X}>", score] for byte in range(256)]
    state["model"] |= {
        "vocab": [*pieces[: len(specials)], *fallback, *pieces[len(specials) :]],
        "byte_fallback": True,
    }
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", specials.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def write(texts: Sequence[str], folder: Path) -> None:
    """Train both and save them as `folder`/teacher and `folder`/student."""
    for name, train in (("teacher", train_teacher_tokenizer), ("student", train_student_tokenizer)):
        train(texts).save_pretrained(folder / name)
