"""Load a tokenizer that does what the folder's own tokenizer.json says.

transformers rebuilds many tokenizers from the class that tokenizer_config.json names, and takes only
vocabulary and merges from tokenizer.json. If the class belongs to another family, ids and text silently
differ from those of the file (transformers#45488, #45920).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rpt_lightning.compat.transformers import cached_path
from rpt_lightning.pretrained.specification import canonical, specification

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def read_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that transformers builds from a folder or hub id.

    Raises OSError or ValueError if it cannot be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError):
        raise
    # The tokenizers library raises plain Exception, and a file with wrong types can raise anything.
    except Exception as error:
        raise ValueError(
            f"its {FILE} or {CONFIG_FILE} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    return tokenizer


def as_in_folder(tokenizer: PreTrainedTokenizerBase, *, where: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer if it matches the ``tokenizer.json`` of its folder, else one built from that file.

    ``where`` begins every message. Raises ValueError if the file cannot be read, gives different tokens in
    each call, or contradicts ``tokenizer_config.json``. A folder without the file has nothing to compare.
    """
    file = folder_file(tokenizer.name_or_path, FILE)
    if file is None:
        return tokenizer
    try:
        wanted = json.loads(Tokenizer.from_file(str(file)).to_str())
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(
            f"{where}: {file} cannot be read ({first_line(error)}); copy the model again"
        ) from error
    if wanted["model"].get("dropout"):
        raise ValueError(
            f"{where}: {file} drops merges at random (dropout {wanted['model']['dropout']}), "
            "so a text would have different tokens in every call; set dropout to null in its model"
        )
    if not _differences(tokenizer, wanted):
        _check_added_ids(tokenizer, where=where)
        return tokenizer
    repaired = PreTrainedTokenizerFast.from_pretrained(tokenizer.name_or_path)
    if parts := _differences(repaired, wanted):
        raise ValueError(
            f"{where}: the tokenizer that transformers builds from this folder has a different "
            f"{' and '.join(parts)} from its {FILE}, so texts would get different tokens; "
            "save the right one there with save_pretrained, "
            f'or set "tokenizer_class" to "PreTrainedTokenizerFast" in {CONFIG_FILE} '
            "and remove what contradicts the file"
        )
    _check_added_ids(repaired, where=where)
    return repaired


def is_repaired(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `AutoTokenizer` builds a different tokenizer from the folder than this one."""
    return canonical(specification(read_tokenizer(tokenizer.name_or_path))) != canonical(
        specification(tokenizer)
    )


def _differences(tokenizer: PreTrainedTokenizerBase, wanted: dict[str, Any]) -> list[str]:
    """Name the parts in which a loaded tokenizer differs from a file.

    The tokenizer may have further added tokens, from tokenizer_config.json.
    """
    ours, theirs = canonical(specification(tokenizer)), canonical(wanted)
    parts = [
        part for part in ("normalizer", "pre_tokenizer", "decoder", "model") if ours[part] != theirs[part]
    ]
    ids = {token[1]: token[0] for token in ours["added_tokens"]}
    if any(ids.get(token[1]) != token[0] for token in theirs["added_tokens"]):
        parts.append("set of added tokens")
    return parts


def _check_added_ids(tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Raise ValueError if tokenizer_config.json gives an added token a different id than it has."""
    file = folder_file(tokenizer.name_or_path, CONFIG_FILE)
    named: dict[str, Any] = (
        {} if file is None else json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
    )
    vocabulary = tokenizer.get_vocab()
    for token_id, token in named.items():
        content = token["content"] if isinstance(token, dict) else str(token)
        if vocabulary.get(content) != int(token_id):
            raise ValueError(
                f"{where}: {file} says that {content!r} has the id {token_id}, and the tokenizer gives it "
                f"{vocabulary.get(content)}; correct the file, or save the right tokenizer there with "
                "save_pretrained"
            )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int, *, where: str) -> None:
    """Raise ValueError if the tokenizer has tokens without a row in the model's embedding.

    A marker may lack a row if no text, no chat template and no end of text needs it (Gemma 3's text models
    have one for images). A run checks its own prompts separately.
    """
    beyond = {token: token_id for token, token_id in tokenizer.get_vocab().items() if token_id >= num_rows}
    if not beyond:
        return
    markers = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    markers -= {
        str(token) for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token
    }
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False) if tokenizer.chat_template else ""
    needed = sorted(
        (token for token in beyond if token not in markers or token in template), key=beyond.__getitem__
    )
    if needed:
        raise ValueError(
            f"{where}: its tokenizer has {len(beyond)} tokens without a row in the model's embedding "
            f"({', '.join(map(repr, needed[:3]))}, id {beyond[needed[0]]} and up; vocab_size is {num_rows}); "
            "save the model after model.resize_token_embeddings(len(tokenizer)), or remove the tokens"
        )


def folder_file(path: str, name: str) -> Path | None:
    """Find a file of a model's folder, here or in the hub's cache. Returns None if there is none."""
    if Path(path).expanduser().is_dir():
        file = Path(path).expanduser() / name
        return file if file.is_file() else None
    try:
        return cached_path(path, name)
    except OSError:
        return None


def first_line(error: Exception) -> str:
    """Return the first line of the error's text, or its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
