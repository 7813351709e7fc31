"""What a tokenizer does, as one comparable value: all of its parts that decide which ids a text gets and which text ids give.

Left out is what decides neither: offsets into the text, truncation and padding (which each call sets anew), and the template around a text, which
`tasks.token_bytes.start_ids` asks for by itself.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

VERSION = "2:"  # before it the hash knew vocabulary, merges and added tokens only, and had no mark
PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}  # by the name of a Sequence's steps
TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ``tokenizer.json`` of the loaded tokenizer. Raises ValueError where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) is not a fast tokenizer (tokenizer.json); use a model that has one"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def canonical(content: dict[str, Any]) -> dict[str, Any]:
    """The parts that decide ids and text, in one form for each meaning."""
    model = dict(content["model"])
    model["merges"] = [
        merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []
    ]
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        model[name] = model.get(name) or None
    if model.get("unk_token") is None:
        model.pop("fuse_unk", None)  # of nothing
    parts: dict[str, Any] = {part: _steps(content.get(part), key) for part, key in PARTS.items()}
    parts["decoder"] = [
        {"type": "ByteLevel"} if step["type"] == "ByteLevel" else step for step in parts["decoder"]
    ]  # it decodes without its options
    added = sorted(
        (token["id"], token["content"], *(bool(token[flag]) for flag in TOKEN_FLAGS))
        for token in content["added_tokens"]
    )
    return {**parts, "model": model, "added_tokens": [list(token) for token in added]}


def _steps(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A component as a flat list of steps, without what concerns offsets alone."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [step for part in component[key] for step in _steps(part, key)]
    return [{name: value for name, value in component.items() if name != "trim_offsets"}]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """``2:`` and sixteen hex digits over the whole specification: equal for equal tokenizers, wherever they were loaded from.

    Raises ValueError for a tokenizer without a ``tokenizer.json`` backend.
    """
    return VERSION + _digest(canonical(specification(tokenizer)))


def earlier_tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The hash as folders and checkpoints of before hold it: over vocabulary, merges and added tokens."""
    content = specification(tokenizer)
    model = content["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    added = sorted((token["id"], token["content"]) for token in content["added_tokens"])
    return _digest([model["type"], model["vocab"], merges, added])


def is_whole(stored: str) -> bool:
    """Whether a stored hash is of the whole specification."""
    return stored.startswith(VERSION)


def has_hash(tokenizer: PreTrainedTokenizerBase, stored: str) -> bool:
    """Whether the tokenizer has a stored hash, as far as a hash of its version tells."""
    return stored == (tokenizer_hash(tokenizer) if is_whole(stored) else earlier_tokenizer_hash(tokenizer))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
