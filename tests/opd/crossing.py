# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers of different kinds and sizes, models of both, and an objective that crosses."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import ClassVar, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import opd_kernels as opk
from opd.batch import Signal
from opd.objectives import ObjectiveSection

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def lines(count=200, seed=0):
    """Sentences about numbers, in several scripts."""
    draw = random.Random(seed)
    words = ["apple", "Äpfel", "яблоко", "苹果", "🍎", "naïve", "1234", "x = y + 1"]
    return [
        f"{draw.choice(words)} {draw.choice('abc')} and {draw.choice(words)}, "
        f"{draw.randint(0, 999)}\tend"
        for _ in range(count)
    ]


@cache
def byte_level(vocab_size=300):
    """Byte-level BPE with ChatML's tokens; it ends a text and a turn with different ones."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@cache
def pieces(vocab_size=500):
    """As SentencePiece has them: BPE over U+2581, single bytes for what it never saw."""
    from transformers import PreTrainedTokenizerFast

    grown = Tokenizer(models.BPE())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="never")
    grown.pre_tokenizer = metaspace
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, show_progress=False
    )
    grown.train_from_iterator(lines(), trainer)
    model = json.loads(grown.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=BRACKETS,
        clean_up_tokenization_spaces=False,
    )


class ChunkGap(ObjectiveSection):
    """loss = (1 / C) sum over aligned chunks of (log p_teacher - log p_student)^2."""

    needs_teacher: ClassVar[bool] = True
    asks: ClassVar[str] = "token_logprobs"
    needs_behaviour_logprobs: ClassVar[bool] = False
    crosses_tokenizers: ClassVar[bool] = True

    kind: Literal["chunk_gap"] = "chunk_gap"

    def ask(self, teacher, batch):
        teacher.prefetch(token_ids=batch.for_teacher.token_ids[:, None])

    def __call__(self, student, teacher, batch, num_step_tokens):
        translation = batch.translation
        with torch.no_grad():
            theirs = teacher.token_logprobs(translation.batch.token_ids).logprobs
        ours = student.token_logprobs(batch.token_ids).logprobs
        gaps = opk.chunk_logprobs(theirs, translation.teacher_offsets) - opk.chunk_logprobs(
            ours, translation.student_offsets
        )
        gaps = gaps * translation.is_aligned
        loss = gaps.square().sum() / max(1, translation.num_step_chunks)
        return Signal(loss=loss, statistics={"gap": gaps.detach()})


def with_objective(config, objective):
    """The same run with an objective that is in no list."""
    return config.model_copy(update={"objective": objective})
