"""The policy's tokenizer, and whether the proxy speaks it."""

from __future__ import annotations

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from rpt_lightning.tasks.token_bytes import start_ids
from rpt_lightning.types import TokenIds


def load_tokenizer(name: str, *, flag: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or hub id. Raises ValueError that names ``flag``."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {name!r}: no tokenizer could be loaded from this folder or hub id ({_first_line(error)})") from error


def check_proxy(proxy: str, tokenizer: PreTrainedTokenizerBase, *, tokenizer_name: str) -> TokenIds:
    """What the proxy expects in front of every text. Raises ValueError where its token ids mean something else than the policy's."""
    proxy_tokenizer = load_tokenizer(proxy, flag="--proxy")
    if proxy_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--proxy {proxy!r} ({len(proxy_tokenizer)} tokens) has another tokenizer than --tokenizer {tokenizer_name!r} ({len(tokenizer)} tokens): "
            "the same ids mean different text; name a proxy of the same model family"
        )
    try:
        vocab_size = AutoConfig.from_pretrained(proxy).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ValueError(f"--proxy {proxy!r}: no model could be loaded from this folder or hub id ({_first_line(error)})") from error
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"--proxy {proxy!r} predicts {vocab_size} tokens, but --tokenizer {tokenizer_name!r} has {len(tokenizer)}; name another proxy"
        )
    return start_ids(proxy_tokenizer)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
