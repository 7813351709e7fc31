"""The tokens that end a model's text.

The tokenizer names one, and generation_config.json often names several (Phi 3.5, Gemma 3, Llama 3).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rpt_lightning.compat.transformers import cached_path
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import TokenIds

_FILES = ("generation_config.json", "config.json")


def end_ids(tokenizer: PreTrainedTokenizerBase, token_bytes: TokenBytes) -> TokenIds:
    """Return the tokenizer's own end-of-text token, then the others that the model's folder names.

    The others come in the order of the first file that names any. A single id is accepted only if it is a
    marker: configurations of small models have their class's default, which may be any piece of text. Raises
    ValueError if the tokenizer has no end-of-text token, or if the file's entry cannot be read.
    """
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token), "
            "so a completion could never stop; set one"
        )
    named = _named(tokenizer.name_or_path)
    others = (
        named
        if isinstance(named, list)
        else [token_id for token_id in (named,) if token_id is not None and token_bytes.is_special(token_id)]
    )
    return tuple(dict.fromkeys([eos_id, *(token_id for token_id in others if token_id in token_bytes)]))


def _named(model: str) -> int | list[int] | None:
    for name in _FILES:
        path = _file(model, name)
        if path is None:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            ids = _eos_of(content)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a readable configuration ({error}); download or export the model again"
            ) from error
        if ids is not None:
            wanted = ids if isinstance(ids, list) else [ids]
            if not all(type(token_id) is int for token_id in wanted):
                raise ValueError(
                    f"{path}: eos_token_id is {ids!r}, but must be an id or a list of ids; correct the file"
                )
            return ids
    return None


def _eos_of(content: Any) -> Any:
    """Return the end-of-text ids. Models of images and text keep the text's settings separately."""
    ids = content.get("eos_token_id")
    return ids if ids is not None else (content.get("text_config") or {}).get("eos_token_id")


def _file(model: str, name: str) -> Path | None:
    """Find a file of a model's folder, or of a hub id whose tokenizer was just read."""
    if not model or Path(model).exists():
        path = Path(model) / name
        return path if model and path.is_file() else None
    try:
        return cached_path(model, name)
    except (OSError, ValueError):  # neither a folder nor a hub id: a tokenizer made in memory
        return None
