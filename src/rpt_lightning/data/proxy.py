"""The policy's tokenizer, and whether the proxy speaks it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from rpt_lightning.pretrained.tokenizer import as_in_folder, first_line, read_tokenizer
from rpt_lightning.tasks.token_bytes import start_ids
from rpt_lightning.types import TokenIds

_MIB = 2**20


def load_tokenizer(name: str, *, flag: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or hub id. Raises ValueError that names ``flag``."""
    try:
        tokenizer = read_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag} {name!r}: no tokenizer could be loaded from this folder or hub id ({first_line(error)})"
        ) from error
    return as_in_folder(tokenizer, where=f"{flag} {name!r}")


def check_proxy(
    proxy: str, tokenizer: PreTrainedTokenizerBase, *, tokenizer_name: str
) -> tuple[TokenIds, TokenIds]:
    """What the proxy expects in front of every text, and the rows of its vocabulary that are no token: vocabularies are padded to round sizes.

    Raises ValueError where its token ids mean something else than the policy's.
    """
    proxy_tokenizer = load_tokenizer(proxy, flag="--proxy")
    vocabulary = tokenizer.get_vocab()
    if proxy_tokenizer.get_vocab() != vocabulary:
        raise ValueError(
            f"--proxy {proxy!r} ({len(proxy_tokenizer)} tokens) has another tokenizer than --tokenizer {tokenizer_name!r} ({len(tokenizer)} tokens): "
            "the same ids mean different text; name a proxy of the same model family"
        )
    try:
        vocab_size = AutoConfig.from_pretrained(proxy).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--proxy {proxy!r}: no model could be loaded from this folder or hub id ({first_line(error)})"
        ) from error
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"--proxy {proxy!r} predicts {vocab_size} tokens, but --tokenizer {tokenizer_name!r} has {len(tokenizer)}; name another proxy"
        )
    tokens = set(vocabulary.values())
    return start_ids(proxy_tokenizer), tuple(row for row in range(vocab_size) if row not in tokens)


def proxy_fingerprint(proxy: str) -> str:
    """Tells the weights of a model folder from others that stand under the same path later: configuration, sizes, first and last MiB of the files.

    Of a hub id only its name is known.
    """
    digest = hashlib.sha256(b"" if Path(proxy).is_dir() else proxy.encode())
    for path in sorted(
        path
        for path in Path(proxy).glob("*")
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_MIB))
            file.seek(max(0, size - _MIB))
            digest.update(file.read())
    return digest.hexdigest()[:16]
