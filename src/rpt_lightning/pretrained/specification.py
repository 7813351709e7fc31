"""The behaviour of a tokenizer as one comparable value.

The value holds all parts of a tokenizer that decide which ids a text gets and which text ids give. It omits
parts that decide neither: offsets into the text, truncation and padding (which each call sets itself), and
the template around a text, which `tasks.token_bytes.start_ids` determines separately.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

VERSION = "2:"  # earlier hashes covered only vocabulary, merges and added tokens, and had no such mark
# By the key of a Sequence's steps.
PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}
TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of the loaded tokenizer. Raises ValueError if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) is not a fast tokenizer "
            "(tokenizer.json); use a model that has one"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def canonical(content: dict[str, Any]) -> dict[str, Any]:
    """Reduce the content to the parts that decide ids and text, in one form for each meaning."""
    model = dict(content["model"])
    model["merges"] = [
        merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []
    ]
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        model[name] = model.get(name) or None
    if model.get("unk_token") is None:
        model.pop("fuse_unk", None)  # it has no effect without an unknown token
    parts: dict[str, Any] = {part: _steps(content.get(part), key) for part, key in PARTS.items()}
    # The ByteLevel decoder ignores its options.
    parts["decoder"] = [
        {"type": "ByteLevel"} if step["type"] == "ByteLevel" else step for step in parts["decoder"]
    ]
    added = sorted(
        (token["id"], token["content"], *(bool(token[flag]) for flag in TOKEN_FLAGS))
        for token in content["added_tokens"]
    )
    return {**parts, "model": model, "added_tokens": [list(token) for token in added]}


def _steps(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Flatten a component into a list of steps, without options that concern offsets alone."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [step for part in component[key] for step in _steps(part, key)]
    return [{name: value for name, value in component.items() if name != "trim_offsets"}]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the whole specification as ``2:`` and sixteen hex digits.

    Equal tokenizers have equal hashes, wherever they were loaded from. Raises ValueError if the tokenizer has
    no ``tokenizer.json`` backend.
    """
    return VERSION + _digest(canonical(specification(tokenizer)))


def earlier_tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute the hash in older folders and checkpoints, over vocabulary, merges and added tokens."""
    content = specification(tokenizer)
    model = content["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    added = sorted((token["id"], token["content"]) for token in content["added_tokens"])
    return _digest([model["type"], model["vocab"], merges, added])


def is_whole(stored: str) -> bool:
    """Whether a stored hash covers the whole specification."""
    return stored.startswith(VERSION)


def has_hash(tokenizer: PreTrainedTokenizerBase, stored: str) -> bool:
    """Whether the tokenizer matches a stored hash, as far as a hash of its version can tell."""
    return stored == (tokenizer_hash(tokenizer) if is_whole(stored) else earlier_tokenizer_hash(tokenizer))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
