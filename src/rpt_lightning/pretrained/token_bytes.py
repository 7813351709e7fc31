"""The exact bytes of each token.

Rewards compare bytes. A token may end inside a character, so decoding to text would lose the token
boundaries.

The bytes are exact in this sense: ``join(encode_plain(text)) == text.encode()`` for byte-level BPE (GPT-2,
Llama 3, Qwen, SmolLM2) that knows every byte. For BPE with byte fallback (Llama 2, Mistral, Gemma) the same
holds for text without U+2581, the character that such tokenizers use for a space. To achieve this, the plain
encoder leaves out everything that would change the text: Unicode normalisation (Qwen's NFC), the space that
some tokenizers put before the text, and added tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from rpt_lightning.pretrained.specification import specification as read_specification
from rpt_lightning.pretrained.specification import tokenizer_hash as tokenizer_hash
from rpt_lightning.types import TokenIds

SPACE_MARK = "▁"  # U+2581, sentencepiece's visible space

NO_TOKEN = "\ufffd".encode()


def byte_of_character() -> dict[str, int]:
    """Return GPT-2's byte alphabet.

    Printable Latin-1 bytes stand for themselves. The other 68 are moved to U+0100 and up, in order.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + rank): byte for rank, byte in enumerate(moved)
    }


def _steps(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """List the steps of a tokenizer component, which may be absent, a single step or a sequence."""
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Return the tokens before every text: a begin-of-text token (Llama 3), or nothing (Qwen, SmolLM2)."""
    bos_id, first_ids = tokenizer.bos_token_id, tokenizer("").input_ids[:1]
    return (
        (bos_id,)
        if isinstance(bos_id, int) and bos_id != tokenizer.eos_token_id and first_ids == [bos_id]
        else ()
    )


class TokenBytes:
    """The bytes of each token id of a fast tokenizer, and an encoder that treats all of a text as plain text.

    Added tokens (special or not: ``<|im_end|>``, ``<think>``) have their literal content as bytes.
    ``encode_plain`` never produces them. Added tokens that consist of whitespace only (the runs of spaces of
    GPT-NeoX and OLMo) are ordinary vocabulary. ``token_bytes[id]`` raises KeyError if the tokenizer does not
    have the id (the padding rows of a model's embedding).

    Raises ValueError if the tokenizer is neither byte-level BPE nor BPE with byte fallback.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        specification = read_specification(tokenizer)
        self._name = tokenizer.name_or_path
        model = specification["model"]
        pre_tokenizers = _steps(specification["pre_tokenizer"], "pretokenizers")
        is_byte_level = any(step["type"] == "ByteLevel" for step in pre_tokenizers)
        self._is_byte_level = is_byte_level
        if model["type"] != "BPE" or not (is_byte_level or model.get("byte_fallback")):
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} is of kind {model['type']} without byte-level pieces "
                "or byte fallback, so its tokens have no exact bytes; use a model with a byte-level BPE "
                "tokenizer (Llama 3, Qwen, SmolLM2) or byte fallback (Llama 2, Mistral, Gemma)"
            )
        added = specification["added_tokens"]
        ordinary = [
            token
            for token in added
            if not token["special"] and token["content"].replace(SPACE_MARK, " ").isspace()
        ]
        self._special_ids = frozenset(token["id"] for token in added) - {token["id"] for token in ordinary}
        piece_bytes = _byte_level_piece if is_byte_level else _byte_fallback_piece
        self._bytes: dict[int, bytes] = {
            token_id: piece_bytes(piece)
            for piece, token_id in model["vocab"].items()
            if token_id not in self._special_ids
        }
        for token in added:
            if token["id"] not in self._bytes:
                self._bytes[token["id"]] = token["content"].encode()
        self._plain = _plain_encoder(specification, ordinary, is_byte_level=is_byte_level)

    def __getitem__(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def __contains__(self, token_id: int) -> bool:
        """Whether the tokenizer has the id."""
        return token_id in self._bytes

    def drawn(self, token_id: int) -> bytes:
        """Return the bytes of a token that a model drew.

        Embeddings are often padded. A weak policy may draw a row that is not a token, which gives U+FFFD.
        """
        return self._bytes.get(token_id, NO_TOKEN)

    def join(self, token_ids: Iterable[int]) -> bytes:
        """Concatenate the bytes of a sequence of tokens."""
        return b"".join([self._bytes[token_id] for token_id in token_ids])

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a marker that plain text never contains.

        Any added token is one, whether it is declared special or not.
        """
        return token_id in self._special_ids

    def plain_text(self, text: str) -> str:
        """Return the text as its tokens represent it. With byte fallback a U+2581 becomes a space."""
        return text if self._is_byte_level else text.replace(SPACE_MARK, " ")

    def encode_plain(self, text: str) -> TokenIds:
        """Encode a text in which ``</think>`` or ``<|im_end|>`` are characters like any others.

        Raises ValueError if the tokenizer cannot express the text. Some vocabularies lack a few bytes
        (SmolLM2 has no U+0004), and a Tokenizer would silently drop them. A lone surrogate raises
        UnicodeEncodeError, which is a ValueError too.
        """
        text = self.plain_text(text)
        expected = text.encode()
        ids: TokenIds = tuple(self._plain.encode(text, add_special_tokens=False).ids)
        if self.join(ids) != expected:
            missing = sorted(
                character
                for character in set(text)
                if self.join(self._plain.encode(character).ids) != character.encode()
            )
            names = ", ".join(map(ascii, missing[:5]))
            raise ValueError(
                f"tokenizer {self._name!r} has no tokens for the characters {names}; "
                "remove them from the text"
            )
        return ids


_BYTE_OF_CHARACTER = byte_of_character()


def _byte_level_piece(piece: str) -> bytes:
    # A piece outside the alphabet is in the vocabulary as literal text (some tokenizers keep their markers
    # there).
    return (
        bytes([_BYTE_OF_CHARACTER[character] for character in piece])
        if all(c in _BYTE_OF_CHARACTER for c in piece)
        else piece.encode()
    )


def _byte_fallback_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def _plain_encoder(
    specification: dict[str, Any], ordinary: list[dict[str, Any]], *, is_byte_level: bool
) -> Tokenizer:
    """Build the tokenizer without its markers and without anything that changes the text.

    ``split_special_tokens=True`` is not enough. The backend then splits the added tokens that are declared
    special, but it still matches the others, such as the ``<think>`` of Qwen 3 and of the R1 distillations.
    """
    plain = {
        **specification,
        "added_tokens": ordinary,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    replaces_space = [
        step
        for step in _steps(specification["normalizer"], "normalizers")
        if step["type"] == "Replace" and step["content"] == SPACE_MARK
    ]
    plain["normalizer"] = None if is_byte_level or not replaces_space else replaces_space[0]
    for step in _steps(specification["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    return Tokenizer.from_str(json.dumps(plain))
