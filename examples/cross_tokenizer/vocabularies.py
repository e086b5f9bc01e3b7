# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers that agree on little, trained on the same text.

The teacher's is byte-level BPE as in GPT-2, and no token begins a text. The student's is BPE over
characters as in SentencePiece and Llama 2, with U+2581 for a space, bytes for the characters that
it has no token of, half the size, and a token that begins every text. (Unigram would differ more;
its trainer in `tokenizers` writes another vocabulary at each run.)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEACHER_SIZE, STUDENT_SIZE = 800, 480
SPACE = "▁"
# of characters in the student's vocabulary; the rarer half of the Hangul is left to bytes
_NUM_CHARACTERS = 90


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
    """BPE of `STUDENT_SIZE` tokens over characters, with all bytes, as transformers wraps it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never")
    # line ends are in no token: they are left to bytes, as in Llama 2
    lines = [line.replace(" ", SPACE) for text in texts for line in text.splitlines()]
    counts = Counter("".join(lines))
    # the trainer's own choice between characters that are as frequent differs from run to run
    characters = sorted(counts, key=lambda one: (-counts[one], one))[:_NUM_CHARACTERS]
    trainer = trainers.BpeTrainer(
        vocab_size=STUDENT_SIZE - 256,
        special_tokens=specials,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    state = json.loads(tokenizer.to_str())
    learned = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    ordered = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned[len(specials) :]]
    state["model"] |= {
        "vocab": {token: place for place, token in enumerate(ordered)},
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
