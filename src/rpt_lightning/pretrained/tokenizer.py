"""A tokenizer that does what the folder's own tokenizer.json says.

transformers builds many tokenizers anew from the class that tokenizer_config.json names and takes only vocabulary and merges from tokenizer.json. Where
the class is another family's, ids and text are others than the file's, without a word (transformers#45488, #45920).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from rpt_lightning.pretrained.specification import canonical, specification

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def read_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """What transformers makes of a folder or hub id. Raises OSError or ValueError where that is nothing."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError):
        raise
    except (
        Exception
    ) as error:  # the tokenizers library raises Exception itself, and a file with other types anything
        raise ValueError(
            f"its {FILE} or {CONFIG_FILE} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    return tokenizer


def as_in_folder(tokenizer: PreTrainedTokenizerBase, *, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer, or where it differs from the ``tokenizer.json`` of the folder it came from, one that is built from that file.

    ``where`` begins every message. Raises ValueError where the file cannot be read, gives other tokens from one call to the next, or contradicts
    ``tokenizer_config.json``. A folder without the file has nothing to compare.
    """
    file = folder_file(tokenizer.name_or_path, FILE)
    if file is None:
        return tokenizer
    try:
        wanted = json.loads(Tokenizer.from_file(str(file)).to_str())
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(
            f"{where}: {file} cannot be read ({first_line(error)}); copy the model anew"
        ) from error
    if wanted["model"].get("dropout"):
        raise ValueError(
            f"{where}: {file} drops merges at random (dropout {wanted['model']['dropout']}), so a text would have other tokens in every call; set dropout to "
            "null in its model"
        )
    if not _differences(tokenizer, wanted):
        _check_added_ids(tokenizer, where=where)
        return tokenizer
    repaired = PreTrainedTokenizerFast.from_pretrained(tokenizer.name_or_path)
    if parts := _differences(repaired, wanted):
        raise ValueError(
            f"{where}: the tokenizer that transformers makes of this folder has another {' and '.join(parts)} than its {FILE}, so texts would get other tokens; "
            f'save the right one there with save_pretrained, or set "tokenizer_class" to "PreTrainedTokenizerFast" in {CONFIG_FILE} and take out what '
            "contradicts the file"
        )
    _check_added_ids(repaired, where=where)
    return repaired


def is_repaired(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `AutoTokenizer` makes another tokenizer of the folder than this one."""
    return canonical(specification(read_tokenizer(tokenizer.name_or_path))) != canonical(
        specification(tokenizer)
    )


def _differences(tokenizer: PreTrainedTokenizerBase, wanted: dict[str, Any]) -> list[str]:
    """Names of the parts in which a loaded tokenizer differs from a file. It may have further added tokens, of tokenizer_config.json."""
    ours, theirs = canonical(specification(tokenizer)), canonical(wanted)
    parts = [
        part for part in ("normalizer", "pre_tokenizer", "decoder", "model") if ours[part] != theirs[part]
    ]
    ids = {token[1]: token[0] for token in ours["added_tokens"]}
    if any(ids.get(token[1]) != token[0] for token in theirs["added_tokens"]):
        parts.append("set of added tokens")
    return parts


def _check_added_ids(tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Raises ValueError where tokenizer_config.json gives an added token another id than it has."""
    file = folder_file(tokenizer.name_or_path, CONFIG_FILE)
    named: dict[str, Any] = (
        {} if file is None else json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
    )
    vocabulary = tokenizer.get_vocab()
    for token_id, token in named.items():
        content = token["content"] if isinstance(token, dict) else str(token)
        if vocabulary.get(content) != int(token_id):
            raise ValueError(
                f"{where}: {file} says that {content!r} has the id {token_id}, and the tokenizer gives it {vocabulary.get(content)}; mend the file, or save "
                "the right tokenizer there with save_pretrained"
            )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int, *, where: str) -> None:
    """Raises ValueError where the tokenizer has tokens without a row of the model's embedding.

    Markers that neither a text nor the chat template nor an end needs are let pass (Gemma 3's text models have one for images): what a run makes of its
    prompts is checked there.
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
            f"{where}: its tokenizer has {len(beyond)} tokens without a row of the model's embedding ({', '.join(map(repr, needed[:3]))}, id {beyond[needed[0]]} "
            f"and on; vocab_size is {num_rows}); save the model after model.resize_token_embeddings(len(tokenizer)), or take the tokens out"
        )


def folder_file(path: str, name: str) -> Path | None:
    """A file of a model's folder, here or in the cache of the hub; None where there is none."""
    if Path(path).expanduser().is_dir():
        file = Path(path).expanduser() / name
        return file if file.is_file() else None
    try:
        found = cached_file(
            path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None
    return None if found is None else Path(found)


def first_line(error: Exception) -> str:
    """Of its text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
