"""Load the policy's tokenizer and check that the proxy has the same one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from rpt_lightning.pretrained.token_bytes import start_ids
from rpt_lightning.pretrained.tokenizer import as_in_folder, first_line, read_tokenizer
from rpt_lightning.types import TokenIds

_MIB = 2**20


def load_tokenizer(name: str, *, flag: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or hub id. Raises ValueError that names ``flag``."""
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
    """Check that the proxy's token ids mean the same text as the policy's. Raises ValueError if they do not.

    Returns the tokens that the proxy expects before every text, and the rows of its vocabulary that are not
    tokens. Such rows exist because vocabularies are padded to round sizes.
    """
    proxy_tokenizer = load_tokenizer(proxy, flag="--proxy")
    vocabulary = tokenizer.get_vocab()
    if proxy_tokenizer.get_vocab() != vocabulary:
        raise ValueError(
            f"--proxy {proxy!r} ({len(proxy_tokenizer)} tokens) has a different tokenizer from "
            f"--tokenizer {tokenizer_name!r} ({len(tokenizer)} tokens): the same ids mean different text; "
            "name a proxy of the same model family"
        )
    try:
        vocab_size = AutoConfig.from_pretrained(proxy).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--proxy {proxy!r}: no model could be loaded from this folder or hub id ({first_line(error)})"
        ) from error
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"--proxy {proxy!r} predicts {vocab_size} tokens, but --tokenizer {tokenizer_name!r} has "
            f"{len(tokenizer)}; name another proxy"
        )
    tokens = set(vocabulary.values())
    return start_ids(proxy_tokenizer), tuple(row for row in range(vocab_size) if row not in tokens)


def proxy_fingerprint(proxy: str) -> str:
    """Fingerprint a model folder, to tell its weights from others under the same path later.

    The fingerprint covers the configuration and each file's size and its first and last MiB. For a hub id it
    covers only the name.
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
