# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of every kind there is, trained on `tests.texts` in seconds."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests import texts

# of lines, for training: every character is in them, as lines(10_000) has no others
_NUM_LINES = 1500
_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
_LLAMA3 = _PIECES + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_end|>", "<|tool|>"]


@cache
def corpus() -> tuple[str, ...]:
    """Lines to train on, and behind them every character that the other lines have."""
    some = texts.lines(_NUM_LINES)
    rest = sorted(set("".join(texts.lines())) - set("".join(some)))
    return (*some, *rest)


def alphabet() -> list[str]:
    return sorted(set("".join(texts.lines())))


def _trained(tokenizer: tokenizers.Tokenizer, trainer: Any) -> tokenizers.Tokenizer:
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


# -- exact ---------------------------------------------------------------------------------------


def byte_level_gpt2() -> tokenizers.Tokenizer:
    """As GPT-2: byte-level BPE, its regex, a special token that is beginning and end at once."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=900,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>"],
            show_progress=False,
        ),
    )


def byte_level_llama3() -> Any:
    """As Llama 3 and Qwen, in transformers: NFC, runs of spaces, ends of turns, a chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=2500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|turn_over|>", "<|x|>"])
    tokenizer.add_tokens(["<think>", "é́", "      "])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}<|x|>{{ m.role }}\n{{ m.content }}<|turn_over|>\n"
        "{% endfor %}",
    )


def llama2() -> tokenizers.Tokenizer:
    """As Llama 2 in `tokenizers`: BPE with byte fallback, a prefix space by the normalizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=400,
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("▁+[^▁]*"), "isolated")
    _trained(tokenizer, trainer)
    state = tokenizer.to_str()
    tokenizer = tokenizers.Tokenizer.from_str(_keep_added(state, 3))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _keep_added(state: str, count: int) -> str:
    """The tokenizer with its first added tokens only: byte pieces are the model's own."""
    import json

    content = json.loads(state)
    content["added_tokens"] = content["added_tokens"][:count]
    return json.dumps(content)


def _sentencepiece(**options: Any) -> Any:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\0", "") for line in corpus() if line != "\0"),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        pad_id=3,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_bpe() -> Any:
    """As Llama 2 and Mistral: a SentencePiece BPE model, byte fallback, text as it is."""
    return _sentencepiece(
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_end|>", "<tool>", "▁▁▁▁"],
    )


def sentencepiece_unigram() -> Any:
    """As mT5: SentencePiece Unigram that normalises (NFKC) and drops spaces; byte fallback."""
    return _sentencepiece(
        model_type="unigram",
        vocab_size=1200,
        byte_fallback=True,
        character_coverage=0.98,
        control_symbols=["<|im_end|>", "<|tool|>"],
    )


def transformers_sentencepiece() -> Any:
    """A transformers tokenizer in Python over a sentencepiece model."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.model")
        path.write_bytes(zoo("sentencepiece_bpe").serialized_model_proto())
        tokenizer = SentencePieceBackend(
            vocab_file=str(path),
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
        )
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """Unigram in `tokenizers` with Metaspace and a token for every character, but none of bytes."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return _trained(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=1800,
            special_tokens=SPECIALS,
            unk_token="<unk>",
            initial_alphabet=alphabet(),
            show_progress=False,
        ),
    )


def word_piece() -> tokenizers.Tokenizer:
    """WordPiece that keeps spaces: words begin with one, and parts of words with a mark."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.model.continuing_subword_prefix = "\u2063"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2063", ""), decoders.Metaspace(prepend_scheme="never")]
    )
    return _trained(
        tokenizer,
        trainers.WordPieceTrainer(
            vocab_size=3000,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet(),
            continuing_subword_prefix="\u2063",
            show_progress=False,
        ),
    )


def tiktoken_bpe() -> Any:
    """tiktoken with the ranks of a byte-level BPE that was trained here."""
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1100,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=10,
        show_progress=False,
    )
    _trained(trained, trainer)
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    tokens = [bytes(byte_of[char] for char in trained.id_to_token(i)) for i in range(1100)]
    return tiktoken.Encoding(
        name="trained",
        pat_str=_LLAMA3.replace(r"\s+(?!\S)|\s+", r"\s+"),
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": 1100, "<|im_end|>": 1105, "<|tool|>": 1106},
    )


def byt5() -> Any:
    """Bytes, as ByT5."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=4)


def characters() -> tokenizers.Tokenizer:
    """WordLevel with a token for every character."""
    ids = {token: i for i, token in enumerate([*SPECIALS, *alphabet()])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


# -- not exact -----------------------------------------------------------------------------------


def bert() -> tokenizers.Tokenizer:
    """As BERT: lowercase without accents, whitespace dropped."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(
        tokenizer,
        trainers.WordPieceTrainer(
            vocab_size=1500, special_tokens=["[UNK]", "[PAD]", "[MASK]"], show_progress=False
        ),
    )


def t5() -> tokenizers.Tokenizer:
    """As T5: Unigram over NFKC without byte fallback."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=900, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
        ),
    )


def words() -> tokenizers.Tokenizer:
    """WordLevel over whitespace."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _trained(
        tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False)
    )


_MAKERS: dict[str, Callable[[], Any]] = {
    maker.__name__: maker
    for maker in (
        byte_level_gpt2,
        byte_level_llama3,
        llama2,
        sentencepiece_bpe,
        sentencepiece_unigram,
        transformers_sentencepiece,
        unigram,
        word_piece,
        tiktoken_bpe,
        byt5,
        characters,
        bert,
        t5,
        words,
    )
}
LOSSY = ("bert", "t5", "words")
EXACT = tuple(name for name in _MAKERS if name not in LOSSY)


@cache
def zoo(name: str) -> Any:
    """The tokenizer of one of EXACT or LOSSY; trained once per process."""
    return _MAKERS[name]()
