# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers of different kinds and sizes, and models of both."""

from __future__ import annotations

import json
import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def save_pair(folder, *, rows=24, chats=False):
    """A student and a teacher on disk, each with its tokenizer, rows of data, and the keys of a run
    of both."""
    from tests.opd.conftest import make_hf_model

    paths = {}
    for seed, (name, tokenizer) in enumerate((("student", byte_level()), ("teacher", pieces()))):
        paths[name] = str(folder / name)
        # the teacher's head is padded beyond its tokens
        model = make_hf_model(
            seed=seed + 1, vocab_size=len(tokenizer) + 12 * seed, max_position_embeddings=256
        )
        ends = [0, 2] if name == "student" else tokenizer.eos_token_id
        model.generation_config.eos_token_id = ends
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    data = folder / "rows.jsonl"
    texts = [(line[:12], line[12:]) for line in lines(rows, seed=9)]
    with data.open("w") as file:
        for prompt, completion in texts:
            given = [{"role": "user", "content": prompt}] if chats else prompt
            file.write(json.dumps({"prompt": given, "completion": completion}) + "\n")
    return {
        "output_dir": str(folder / "run"),
        "seed": 0,
        "num_threads": 1,
        "student": {"model_name_or_path": paths["student"]},
        "teacher": {"model_name_or_path": paths["teacher"]},
        "data": {"train_file": str(data), "eval_file": str(data)},
        "rollouts": {"kind": "hf", "max_completion_length": 8},
        "objective": {"kind": "alm"},
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": ["jsonl"],
    }


def checked(values, **changes):
    """What `opd check` finds in a run."""
    from opd.check import check
    from opd.config import parse_config

    return check(parse_config({**values, **changes}))


def table(found, title):
    """A table of the findings, by its first column and its header."""
    (one,) = (table for table in found.tables if table.title == title)
    return {row[0]: dict(zip(one.header[1:], row[1:], strict=True)) for row in one.rows}
