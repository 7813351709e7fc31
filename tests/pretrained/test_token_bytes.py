from __future__ import annotations

import copy
import unicodedata
from types import SimpleNamespace

import pytest
import toy_tokenizers as toys
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rpt_lightning.pretrained.token_bytes import TokenBytes, byte_of_character, tokenizer_hash

MARKERS = [
    "</think>",
    "<think>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "<0x41>",
    "<unk>",
    "  ",
    "    ",
    "\t",
    "▁",
    "\\boxed{",
    "é",
    "😀",
    "漢",
    "\x00",
    "Ġ",
]
TEXTS = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(max_size=6)), max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.booleans())
def test_byte_level_is_exact(text: str, add_prefix_space: bool) -> None:
    token_bytes = TokenBytes(toys.byte_level(think_tokens=True, add_prefix_space=add_prefix_space))
    ids = token_bytes.encode_plain(text)
    assert token_bytes.join(ids) == text.encode() == b"".join(token_bytes[token_id] for token_id in ids)
    assert not any(token_bytes.is_special(token_id) for token_id in ids)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.booleans())
def test_byte_fallback_is_exact_up_to_the_space_mark(text: str, metaspace: bool) -> None:
    token_bytes = TokenBytes(toys.byte_fallback(metaspace=metaspace))
    ids = token_bytes.encode_plain(text)
    assert token_bytes.join(ids) == text.replace("▁", " ").encode()
    assert not any(token_bytes.is_special(token_id) for token_id in ids)


def test_the_tiny_model_is_exact(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    token_bytes = TokenBytes(tiny_tokenizer)
    text = "".join(MARKERS) + "".join(map(chr, range(256)))
    assert token_bytes.join(token_bytes.encode_plain(text)) == text.encode()


def test_the_tokenizers_own_encoder_is_not_plain() -> None:
    """encode_plain is needed because the usual call turns markers into tokens.

    split_special_tokens still matches the markers that are not declared special.
    """
    tokenizer = toys.byte_level(think_tokens=True)
    marker_id = tokenizer.get_added_vocab()["</think>"]
    assert marker_id in tokenizer("a</think>", add_special_tokens=False).input_ids
    assert marker_id in tokenizer("a</think>", add_special_tokens=False, split_special_tokens=True).input_ids
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes.is_special(marker_id)
    assert token_bytes[marker_id] == b"</think>"
    assert token_bytes.join([marker_id, tokenizer.eos_token_id]) == b"</think><|endoftext|>"


def test_text_is_neither_normalised_nor_prefixed() -> None:
    decomposed = unicodedata.normalize("NFD", "é")
    tokenizer = toys.byte_level(add_prefix_space=True)
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes.join(token_bytes.encode_plain(decomposed)) == decomposed.encode()
    assert token_bytes.join(tokenizer(decomposed, add_special_tokens=False).input_ids) == " é".encode()


def test_ordinary_text_gets_the_tokens_that_the_model_knows() -> None:
    tokenizer = toys.byte_level(think_tokens=True)
    text = " the sum of two numbers,   even"
    assert (
        list(TokenBytes(tokenizer).encode_plain(text)) == tokenizer(text, add_special_tokens=False).input_ids
    )
    assert tokenizer.get_added_vocab()["   "] in TokenBytes(tokenizer).encode_plain(text)


def test_the_last_usual_call_does_not_change_the_plain_encoder() -> None:
    # A copy, because other tests share the tokenizer, and the call leaves its truncation set.
    tokenizer = copy.deepcopy(toys.byte_level())
    token_bytes = TokenBytes(tokenizer)
    before = token_bytes.encode_plain("x<|im_end|>")
    tokenizer("x<|im_end|>", truncation=True, max_length=1)
    assert token_bytes.encode_plain("x<|im_end|>") == before
    assert len(before) > 2


def test_tokens_may_split_a_character() -> None:
    token_bytes = TokenBytes(toys.byte_fallback())
    pieces = [token_bytes[token_id] for token_id in token_bytes.encode_plain("🜚")]
    assert pieces == [b"\xf0", b"\x9f", b"\x9c", b"\x9a"]


def test_byte_alphabet() -> None:
    alphabet = byte_of_character()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["a"], alphabet["ÿ"], alphabet["Ń"]) == (
        0x20,
        0x0A,
        0x61,
        0xFF,
        0xAD,
    )


def test_characters_without_a_token_are_an_error() -> None:
    token_bytes = TokenBytes(toys.with_missing_bytes())
    assert token_bytes.join(token_bytes.encode_plain("café 😀")) == "café 😀".encode()
    with pytest.raises(ValueError, match=r"'\\x04'"):
        token_bytes.encode_plain("caf\x04")


def test_a_lone_surrogate_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        TokenBytes(toys.byte_level()).encode_plain("\ud800")


def test_other_kinds_of_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="WordPiece"):
        TokenBytes(toys.word_pieces())
    with pytest.raises(ValueError, match="not a fast tokenizer"):
        TokenBytes(SimpleNamespace(name_or_path="slow"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tokenizer",
    [toys.byte_level(think_tokens=True), toys.byte_fallback()],
    ids=["byte_level", "byte_fallback"],
)
def test_hash_survives_saving(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(tokenizer)


def test_hash_tells_tokenizers_apart() -> None:
    tokenizers = [
        toys.byte_level(),
        toys.byte_level(think_tokens=True),
        toys.with_missing_bytes(),
        toys.byte_fallback(),
    ]
    assert len({tokenizer_hash(tokenizer) for tokenizer in tokenizers}) == 4


def test_each_character_of_a_text_that_cannot_be_expressed_is_tried_once() -> None:
    token_bytes = TokenBytes(toys.with_missing_bytes())
    encode = token_bytes._plain.encode
    tried: list[str] = []

    def listening(text: str, **options: bool):
        tried.append(text)
        return encode(text, **options)

    token_bytes._plain = SimpleNamespace(encode=listening)  # type: ignore[assignment]
    text = "the sum of two numbers " * 50 + "\x04"
    with pytest.raises(ValueError, match=r"no tokens for the characters '\\x04'"):
        token_bytes.encode_plain(text)
    assert sorted(tried) == sorted([text, *set(text)])
