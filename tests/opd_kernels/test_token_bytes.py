# SPDX-License-Identifier: Apache-2.0
"""TokenBytes: ids spell texts, byte strings become ids that spell them, or an error says why."""

from __future__ import annotations

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

import opd_kernels as opk
from opd_kernels._token_cut import ExactEncoder
from tests import texts
from tests.tokenizer_zoo import EXACT, LOSSY, zoo

NUM_LINES = 300
# of EXACT, those that have a token for each of the 256 bytes
COVERING = tuple(name for name in EXACT if name not in ("unigram", "word_piece", "characters"))


def own_ids(name: str, text: str) -> list[int]:
    """A text as the tokenizer itself cuts it, special tokens around it left out."""
    tokenizer = zoo(name)
    if name == "tiktoken_bpe":
        return tokenizer.encode_ordinary(text)
    if hasattr(tokenizer, "piece_to_id"):
        return tokenizer.encode(text)
    if callable(tokenizer):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.encode(text, add_special_tokens=False).ids


# -- real tokenizers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_lines_come_back_byte_for_byte(name):
    token_bytes = opk.TokenBytes(zoo(name))
    lines = [line.encode() for line in texts.lines(NUM_LINES)]
    batch = token_bytes.encode_batch(lines)
    assert token_bytes.is_exact
    assert [token_bytes.join(ids) for ids in batch] == lines
    assert token_bytes.encode(lines[0]) == batch[0]
    # what a tokenizer is for: less ids than bytes
    assert name in ("byt5",) or sum(map(len, batch)) < sum(map(len, lines)) * 0.9


@pytest.mark.parametrize("name", EXACT)
def test_text_is_cut_as_the_tokenizer_cuts_it(name):
    token_bytes = opk.TokenBytes(zoo(name))
    for text in ("the model reads a line, and writes what follows it.", "модель 世界 3.14"):
        ids = own_ids(name, text)
        spelled = token_bytes.join(ids)
        assert spelled.removeprefix(b" ") == text.encode()
        assert token_bytes.encode(spelled) == ids


def with_prefix_space():
    tokenizer = tokenizers.Tokenizer.from_str(zoo("byte_level_gpt2").to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize("name", [*EXACT, "with_prefix_space"])
def test_a_text_may_begin_in_a_word_or_with_a_space(name, monkeypatch):
    """One way is enough: what the tokenizer would add in front is switched off, not cut off."""
    monkeypatch.delattr(ExactEncoder, "_around_lost")
    token_bytes = opk.TokenBytes(zoo(name) if name in EXACT else with_prefix_space())
    for text in (b"el reads a line", b" the model", b"\n\n", b"  two"):
        ids = token_bytes.encode(text)
        assert token_bytes.join(ids) == text


def test_added_tokens_that_are_not_special_are_text(monkeypatch):
    monkeypatch.delattr(ExactEncoder, "_around_lost")
    token_bytes = opk.TokenBytes(zoo("byte_level_llama3"))
    think = zoo("byte_level_llama3").convert_tokens_to_ids("<think>")
    assert think in token_bytes.encode(b"so <think> it")
    assert token_bytes[think] == b"<think>"


def test_written_specials_stay_text():
    """A Unigram vocabulary has them among its pieces, with a score that always wins."""
    token_bytes = opk.TokenBytes(zoo("unigram"))
    for special, written in ((5, "<|tool|>"), (1, "<s>")):
        text = f"the model {written} reads {written}"
        assert special in own_ids("unigram", text)
        ids = token_bytes.encode(text.encode())
        assert token_bytes.join(ids) == text.encode()
        assert set(range(6)).isdisjoint(ids)
        # around them the tokenizer's own tokens are kept
        assert ids[:2] == token_bytes.encode(b"the model")


@pytest.mark.parametrize("name", EXACT)
@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)))
def test_any_bytes_come_back_or_are_named(name, data):
    token_bytes = opk.TokenBytes(zoo(name))
    try:
        ids = token_bytes.encode(data)
    except opk.TokenBytesError as error:
        assert name not in COVERING
        assert "no tokens for" in str(error)
    else:
        assert token_bytes.join(ids) == data
        assert not token_bytes.symbols[ids].any()


@pytest.mark.parametrize("name", COVERING)
def test_what_no_text_holds_comes_back(name):
    token_bytes = opk.TokenBytes(zoo(name))
    every = bytes(range(256))
    cut_emoji = "👩‍👩‍👧".encode()[:-2]
    for data in (b"", every, every[::-1] * 3, cut_emoji, b" a " + cut_emoji, b"\xed\xa0\x80x\xff"):
        assert token_bytes.join(token_bytes.encode(data)) == data
    for text in ("▁", "a▁b ▁▁", "e\u0301 ﬁ １ Å", "<unk><s>\0<0x0A>", "<|im_end|><|tool|>"):
        ids = token_bytes.encode(text.encode())
        assert token_bytes.join(ids) == text.encode()
        assert not token_bytes.symbols[ids].any()


def test_tables_are_the_tokens():
    token_bytes = opk.TokenBytes(zoo("sentencepiece_bpe"))
    assert token_bytes.offsets.dtype == torch.int64
    assert token_bytes.offsets.shape == (len(token_bytes) + 1,)
    assert bytes(token_bytes.data.tolist()) == b"".join(token_bytes)
    begin, end = token_bytes.offsets[700:702].tolist()
    assert bytes(token_bytes.data[begin:end].tolist()) == token_bytes[700] != b""
    for role, bit in {"bos": 1, "eos": 2, "eot": 4, "pad": 8, "unk": 16}.items():
        ids = (token_bytes.symbols & bit).nonzero().flatten().tolist()
        assert tuple(ids) == token_bytes.roles[role]
        assert all(token_bytes[i] == b"" for i in ids)


# -- bytes of ids --------------------------------------------------------------------------------


def tokenizer_of(model, *, decoder=None, normalizer=None, pre_tokenizer=None):
    tokenizer = tokenizers.Tokenizer(model)
    for part, value in (
        ("decoder", decoder),
        ("normalizer", normalizer),
        ("pre_tokenizer", pre_tokenizer),
    ):
        if value is not None:
            setattr(tokenizer, part, value)
    return tokenizer


def numbered(*tokens):
    return {token: i for i, token in enumerate(tokens)}


def test_byte_level_characters_are_bytes_and_added_tokens_are_text():
    vocabulary = numbered("Ġa", "Ã©", "Ċ", "Ħ", "aa", "ł", "Ń")
    tokenizer = tokenizer_of(models.BPE(vocabulary, []), decoder=decoders.ByteLevel())
    # as bytes of that map, é would be 0xE9
    tokenizer.add_tokens(["é", "naïve ▁", "<tool>"])
    tokenizer.add_special_tokens(["<|x|>"])
    token_bytes = opk.TokenBytes(tokenizer)
    assert list(token_bytes)[:7] == [b" a", "é".encode(), b"\n", b"\x84", b"aa", b"\xa0", b"\xad"]
    assert list(token_bytes)[7:] == ["é".encode(), "naïve ▁".encode(), b"<tool>", b"<|x|>"]


def test_metaspace_and_byte_pieces():
    vocabulary = numbered("<unk>", "<0x0A>", "<0xE9>", "<0xG0>", "▁▁a", "b▁", "▁", "\n", "cd")
    tokenizer = tokenizer_of(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True),
        decoder=decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    )
    tokenizer.add_special_tokens(["<unk>"])
    # listed as an added token, it is still a token of the model, which writes spaces so
    tokenizer.add_tokens(["▁▁a"])
    token_bytes = opk.TokenBytes(tokenizer)
    expected = [b"", b"\n", b"\xe9", b"<0xG0>", b"  a", b"b ", b" ", b"\n", b"cd"]
    assert list(token_bytes) == expected
    # the byte piece is for bytes that nothing else has
    assert token_bytes.text_ids[b"\n"] == 7
    assert token_bytes.text_ids[b"\xe9"] == 2


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (decoders.WordPiece("##", cleanup=False), [b" a", b"b", b" .", b" n't"]),
        (decoders.WordPiece("##", cleanup=True), [b" a", b"b", b".", b"n't"]),
        (None, [b" a", b" ##b", b" .", b" n't"]),
        (decoders.Fuse(), [b"a", b"##b", b".", b"n't"]),
        (decoders.Strip("#", 1, 0), [b"a", b"#b", b".", b"n't"]),
        (decoders.Replace(tokenizers.Regex("#+"), "é"), [b"a", "éb".encode(), b".", b"n't"]),
    ],
)
def test_decoders_of_text(decoder, expected):
    tokenizer = tokenizer_of(models.WordLevel(numbered("a", "##b", ".", "n't"), unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokens = list(opk.TokenBytes(tokenizer))
    assert tokens == [b"", *expected[1:]]  # "a" is its unk_token


def test_word_end_marks_become_spaces():
    tokenizer = tokenizer_of(
        models.BPE(numbered("a", "b</w>", "ab"), [], end_of_word_suffix="</w>"),
        decoder=decoders.BPEDecoder(),
    )
    assert list(opk.TokenBytes(tokenizer)) == [b"a", b"b ", b"ab"]


def test_ids_need_not_be_dense():
    vocabulary = {"a": 0, "b": 3}
    token_bytes = opk.TokenBytes(
        tokenizer_of(models.WordLevel(vocabulary), decoder=decoders.Fuse())
    )
    assert list(token_bytes) == [b"a", b"", b"", b"b"]
    token_bytes = opk.TokenBytes(zoo("tiktoken_bpe"))
    assert token_bytes[1103] == b"" and not token_bytes.symbols[1103]


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "b": 0, "u": 1}, unk_token="u"),
        models.BPE({"a": 0, "b": 0, "c": 1}, []),
    ],
    ids=["words", "bpe"],
)
def test_two_tokens_of_one_id_end_the_reading(model):
    token_bytes = opk.TokenBytes(tokenizer_of(model, decoder=decoders.Fuse()), lossy=True)
    assert len(token_bytes) == 2 and token_bytes[0] in (b"a", b"b")


# -- roles ---------------------------------------------------------------------------------------


def test_roles_by_name_by_wrapper_and_by_template():
    gpt2 = opk.TokenBytes(zoo("byte_level_gpt2"))
    assert gpt2.roles == {"bos": (), "eos": (0,), "eot": (), "pad": (), "unk": ()}
    llama3 = opk.TokenBytes(zoo("byte_level_llama3"))
    size = zoo("byte_level_llama3").vocab_size
    bos, eos, over, x = (
        zoo("byte_level_llama3").convert_tokens_to_ids(name)
        for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|turn_over|>", "<|x|>")
    )
    assert bos == size
    # no list knows <|turn_over|>, the chat template does
    assert llama3.roles == {"bos": (bos,), "eos": (eos,), "eot": (over,), "pad": (eos,), "unk": ()}
    assert llama3.symbols[[bos, eos, over, x]].tolist() == [1, 2 | 8, 4, 0]
    assert llama3[x] == b"<|x|>"
    assert opk.TokenBytes(zoo("sentencepiece_bpe")).roles["eot"] == (4,)
    unigram = opk.TokenBytes(zoo("unigram"))
    assert [unigram.roles[role] for role in ("unk", "bos", "eos", "pad", "eot")] == [
        (0,), (1,), (2,), (3,), (4,),
    ]  # fmt: skip
    assert unigram[5] == b"<|tool|>"


def test_end_that_is_everything_is_an_end():
    """In GPT-2 one token is bos, eos and unk: as unk it would match nothing."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=zoo("byte_level_gpt2"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    token_bytes = opk.TokenBytes(wrapped)
    assert token_bytes.symbols[0] == 1 | 2
    assert token_bytes.roles["unk"] == ()


def test_ordinary_token_that_pads_keeps_its_bytes():
    class Padded:
        pad_token_id, eos_token_id = 40, 41
        backend_tokenizer = zoo("byte_level_gpt2")

    token_bytes = opk.TokenBytes(Padded())
    assert token_bytes[40] != b"" and not token_bytes.symbols[40]
    assert token_bytes[41] == b"" and token_bytes.symbols[41] == 2


def test_template_that_refuses_is_no_error():
    class Chat:
        chat_template = "x"
        backend_tokenizer = zoo("byte_level_gpt2")

        def apply_chat_template(self, turns, tokenize):
            raise RuntimeError("system turn expected")

    assert opk.TokenBytes(Chat()).roles["eot"] == ()


# -- what cannot be recovered --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("bert", ("lowercases", "strips accents", "drops control", "drops whitespace", "bytes")),
        ("t5", ("NFKC", "' {2,}' by ' '")),
        ("words", ("WhitespaceSplit drops whitespace", "256 of the 256 bytes")),
    ],
)
def test_lossy_tokenizers_are_refused_by_what_they_lose(name, losses):
    with pytest.raises(opk.TokenBytesError, match=r"lossy=True.*mode='repair'") as refusal:
        opk.TokenBytes(zoo(name))
    assert isinstance(refusal.value, ValueError)
    assert [loss for loss in losses if loss not in str(refusal.value)] == []
    token_bytes = opk.TokenBytes(zoo(name), lossy=True)
    assert not token_bytes.is_exact
    assert token_bytes.losses


def test_lossy_ids_spell_what_is_left():
    token_bytes = opk.TokenBytes(zoo("bert"), lossy=True)
    ids = own_ids("bert", "The  Model's\tLÍNE")
    assert token_bytes.join(ids) == b" the model ' s line"
    assert set(LOSSY) == {"bert", "t5", "words"}


def test_normalizer_is_left_out_where_all_bytes_have_tokens():
    token_bytes = opk.TokenBytes(zoo("byte_level_llama3"))
    data = "e\u0301".encode()
    assert token_bytes.join(own_ids("byte_level_llama3", "e\u0301")) == "é".encode()
    assert token_bytes.join(token_bytes.encode(data)) == data
    assert token_bytes.losses == ("its normalizer brings characters to NFC",)


def test_splitting_at_whitespace_is_left_out_where_metaspace_follows(monkeypatch):
    """As in mT5: spaces are dropped before Metaspace, which needs no help."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizer_of(
        models.BPE(numbered(*pieces, "▁", "a"), [], byte_fallback=True),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        ),
    )
    token_bytes = opk.TokenBytes(tokenizer)
    assert token_bytes.is_exact
    assert token_bytes.losses == ("its pre-tokenizer WhitespaceSplit drops whitespace",)
    monkeypatch.delattr(ExactEncoder, "_around_lost")
    assert token_bytes.encode(b"a  a\n") == [257, 256, 256, 257, 10]


def test_normalizer_is_a_loss_where_a_byte_has_no_token():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for tokens, is_refused in ((alphabet, False), (alphabet[:-1], True)):
        tokenizer = tokenizer_of(
            models.BPE(numbered(*tokens), []),
            decoder=decoders.ByteLevel(),
            normalizer=normalizers.NFC(),
            pre_tokenizer=pre_tokenizers.ByteLevel(),
        )
        if is_refused:
            with pytest.raises(opk.TokenBytesError, match="1 of the 256 bytes"):
                opk.TokenBytes(tokenizer)
        else:
            assert opk.TokenBytes(tokenizer).is_exact


def test_loss_that_no_part_admits_is_found_by_probing():
    """A pre-tokenizer that only splits, and a model that turns digits into letters."""

    class Encoding:
        n_vocab, special_tokens_set = 255, frozenset()

        def decode_single_token_bytes(self, token_id):
            return bytes([token_id])

        def encode_ordinary(self, text):
            return list(text.replace("3", "x").encode())

        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    with pytest.raises(opk.TokenBytesError, match=re.escape("spell 'x.14159 1,000,000 0x1F")):
        opk.TokenBytes(Encoding())
    token_bytes = opk.TokenBytes(Encoding(), lossy=True)
    assert token_bytes.join(token_bytes.encode(b"a 3 b")) == b"a 3 b"


def test_ids_that_spell_something_else_are_refused():
    """As in CLIP: spaces are dropped, and its decoder does not put them back."""
    tokenizer = tokenizer_of(
        models.BPE(numbered(*sorted(pre_tokenizers.ByteLevel.alphabet())), []),
        decoder=decoders.ByteLevel(),
        normalizer=normalizers.Lowercase(),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    )
    with pytest.raises(opk.TokenBytesError, match=r"spell 'themodelreads.*nothing to normalise"):
        opk.TokenBytes(tokenizer, lossy=True)


def test_bytes_that_decoding_contradicts_are_refused():
    class Encoding:
        n_vocab, special_tokens_set = 256, frozenset()

        def decode_single_token_bytes(self, token_id):
            return bytes([token_id])

        def encode_ordinary(self, text):
            return list(text.encode())

        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace").replace("q", "Q")

    with pytest.raises(opk.TokenBytesError, match=r"id 113 .* has the bytes b'q'"):
        opk.TokenBytes(Encoding(), lossy=True)


@pytest.mark.parametrize("pattern", [r"\p{L}", r"\h"])
def test_a_pattern_that_python_does_not_read_is_refused(pattern):
    tokenizer = tokenizer_of(
        models.WordLevel({"a": 0}), decoder=decoders.Replace(tokenizers.Regex(pattern), "")
    )
    with pytest.raises(opk.TokenBytesError, match=r"regular expression .* \(bad escape"):
        opk.TokenBytes(tokenizer)


def test_unknown_kinds_are_refused():
    with pytest.raises(opk.TokenBytesError, match=r"got dict.*TokenBytes.from_bytes"):
        opk.TokenBytes({"a": 1})
    ctc = tokenizer_of(models.WordLevel({"a": 0}), decoder=decoders.CTC())
    with pytest.raises(opk.TokenBytesError, match="decoder CTC"):
        opk.TokenBytes(ctc)

    class Upper:
        def normalize(self, normalized):
            normalized.uppercase()

    custom = tokenizer_of(models.WordLevel({"a": 0}))
    custom.normalizer = normalizers.Normalizer.custom(Upper())
    with pytest.raises(opk.TokenBytesError, match="custom Python"):
        opk.TokenBytes(custom)


@pytest.mark.parametrize("name", ["unigram", "characters"])
def test_text_without_tokens_is_named(name):
    token_bytes = opk.TokenBytes(zoo(name))
    message = r"no tokens for 'ꙮ' \(U\+A66E\), before ''"
    with pytest.raises(opk.TokenBytesError, match=message):
        token_bytes.encode("the model ꙮ reads".encode())
    with pytest.raises(opk.TokenBytesError, match=r"U\+2581"):
        opk.TokenBytes(zoo("unigram")).encode("▁".encode())


# -- bytes without a tokenizer -------------------------------------------------------------------


def test_from_bytes_cuts_into_the_fewest_tokens():
    tokens = [b"a", b"ab", b"abc", b"cd", b"d", b"", b"ab", b"\xff", b"x"]
    token_bytes = opk.TokenBytes.from_bytes(tokens, roles={"eos": 8, "pad": [8]})
    assert token_bytes.kind == "given bytes"
    assert token_bytes.encode(b"abcd") == [1, 3]
    assert token_bytes.encode(b"abcdd\xffaab") == [1, 3, 4, 7, 0, 1]
    assert list(token_bytes) == [*tokens[:8], b""]
    assert token_bytes.roles == {"bos": (), "eos": (8,), "eot": (), "pad": (8,), "unk": ()}
    assert token_bytes.symbols.tolist() == [0] * 8 + [10]
    assert token_bytes.text_ids[b"ab"] == 1
    with pytest.raises(opk.TokenBytesError, match="'x'"):
        token_bytes.encode(b"abx")
    assert len(opk.TokenBytes.from_bytes([])) == 0


@given(data=st.data())
def test_from_bytes_spells_whatever_its_tokens_spell(data):
    tokens = data.draw(st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=6))
    ids = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=12))
    token_bytes = opk.TokenBytes.from_bytes(tokens)
    spelled = token_bytes.join(ids)
    found = token_bytes.encode(spelled)
    assert token_bytes.join(found) == spelled
    assert len(found) <= len(ids)


def test_from_bytes_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match=r"tokens\[1\] must be bytes, got <class 'str'>"):
        opk.TokenBytes.from_bytes([b"a", "b"])
    with pytest.raises(ValueError, match=r"roles must be of .*'eot'.* got 'end'"):
        opk.TokenBytes.from_bytes([b"a"], roles={"end": 0})
    with pytest.raises(ValueError, match="eos=1 is not an id of 1 tokens"):
        opk.TokenBytes.from_bytes([b"a"], roles={"eos": (0, 1)})
    for wrong in (1.0, (0.0,), "0", None):
        with pytest.raises(TypeError, match=r"roles must give an id or several, got .* for eos"):
            opk.TokenBytes.from_bytes([b"a"], roles={"eos": wrong})


def test_an_id_of_a_role_is_one_integer():
    roles = {"bos": True, "eos": (1, 1, True)}
    found = opk.TokenBytes.from_bytes([b"a", b""], roles=roles).roles
    assert repr((found["bos"], found["eos"])) == "((1,), (1,))"


# -- use -----------------------------------------------------------------------------------------


def test_ids_outside_are_refused():
    token_bytes = opk.TokenBytes.from_bytes([b"a", b"b"])
    assert token_bytes.join(torch.tensor([1, 0])) == b"ba"
    assert token_bytes.join([]) == token_bytes.join(torch.tensor([], dtype=torch.int64)) == b""
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=f"{wrong} is not an id of this vocabulary.*0 to 1"):
            token_bytes[wrong]
        with pytest.raises(IndexError, match=f"{wrong} is not an id"):
            token_bytes.join([0, wrong])
    with pytest.raises(TypeError, match="expected bytes, got <class 'str'>"):
        token_bytes.encode("a")


def test_one_vocabulary_is_read_once():
    tokenizer = tokenizer_of(models.WordLevel(numbered("a", "b")), decoder=decoders.Fuse())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: opk.TokenBytes(tokenizer), range(8)))
    assert len({one.data.data_ptr() for one in found}) == 1
    tokenizer.add_tokens(["c"])
    assert list(opk.TokenBytes(tokenizer)) == [b"a", b"b", b"c"]
    assert list(found[0]) == [b"a", b"b"]


def test_truncation_and_padding_are_no_part_of_a_tokenizer():
    """A call leaves both on."""
    characters = sorted(set(map(chr, range(33, 127))) | {"▁"})

    def spaced():
        tokenizer = tokenizer_of(
            models.BPE(numbered("<unk>", "<pad>", *characters), [], unk_token="<unk>"),
            decoder=decoders.Metaspace(prepend_scheme="never"),
            pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"),
        )
        tokenizer.add_special_tokens(["<unk>", "<pad>"])
        return tokenizer

    def states(tokenizer):
        return tokenizer.truncation, tokenizer.padding

    tokenizer = spaced()
    tokenizer.enable_truncation(8)
    # the JSON of it begins as the rest does
    tokenizer.enable_padding(pad_id=1, pad_token='"added_tokens":')
    before = states(tokenizer)
    cut = opk.TokenBytes(tokenizer)
    assert cut.is_exact and states(tokenizer) == before
    assert cut.losses == opk.TokenBytes(spaced()).losses == ()
    assert cut.data.data_ptr() == opk.TokenBytes(spaced()).data.data_ptr()
    assert cut.join(cut.encode(b"hello there, all of you")) == b"hello there, all of you"


def test_merges_are_part_of_a_vocabulary():
    """The same tokens, cut otherwise."""
    vocabulary = numbered("a", "b", "ab", "ba")
    batch = [
        opk.TokenBytes(
            tokenizer_of(models.BPE(vocabulary, merges), decoder=decoders.Fuse())
        ).encode(b"aba")
        for merges in ([("a", "b"), ("b", "a")], [("b", "a"), ("a", "b")])
    ]
    assert batch == [[2, 0], [0, 3]]


def test_fingerprint_tells_bytes_and_roles_apart():
    prints = [
        opk.TokenBytes.from_bytes(tokens, roles=roles).fingerprint
        for tokens, roles in (
            ([b"ab", b"c"], None),
            ([b"a", b"bc"], None),
            ([b"ab", b"c", b""], None),
            ([b"ab", b"c"], {"eos": 1}),
            ([b"ab", b"c"], {"pad": 1}),
        )
    ]
    assert len(set(prints)) == 5
    assert prints[0] == opk.TokenBytes.from_bytes([b"ab", b"c"]).fingerprint
    assert re.fullmatch("[0-9a-f]{32}", prints[0])


@pytest.mark.parametrize("name", EXACT)
def test_a_copy_and_a_pickle_are_the_same(name):
    token_bytes = opk.TokenBytes(zoo(name))
    for other in (pickle.loads(pickle.dumps(token_bytes)), copy.deepcopy(token_bytes)):
        assert other.fingerprint == token_bytes.fingerprint
        assert other.encode(b"a line") == token_bytes.encode(b"a line")


def test_slices_are_lists_and_a_batch_is_not_joined():
    token_bytes = opk.TokenBytes.from_bytes([b"a", b"b", b"c"], roles={"eos": 1})
    assert token_bytes[0:2] == [b"a", b""]
    with pytest.raises(ValueError, match=r"must have one dimension, got shape \(1, 2\)"):
        token_bytes.join(torch.tensor([[0, 2]]))
