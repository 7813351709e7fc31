"""The documents of one split, as an objective sees them while `rpt prepare` makes a task folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, final

from numpy.typing import NDArray

from rpt_lightning.pretrained.token_bytes import TokenBytes

CACHED_DOCUMENTS = 1024


@final
class SplitDocuments:
    """All documents of a split. Training documents and held-out ones never see each other.

    Args:
        doc_ids: The id of each document.
        token_ids: The tokens of each document, ``[L]``.
        is_cut: Whether each document was truncated, so that its last sentence may be a part.
        tokens: The bytes of the tokenizer's tokens.
    """

    def __init__(
        self,
        doc_ids: Sequence[str],
        token_ids: Sequence[NDArray[Any]],
        is_cut: Sequence[bool],
        tokens: TokenBytes,
    ) -> None:
        self.doc_ids = doc_ids
        self.is_cut = is_cut
        self.tokens = tokens
        self._token_ids = token_ids
        self.pieces = lru_cache(CACHED_DOCUMENTS)(self._pieces)

    def __len__(self) -> int:
        return len(self.doc_ids)

    def _pieces(self, number: int) -> tuple[bytes, ...]:
        """Return the bytes of each token of a document. ``pieces(number)`` caches the most recent ones."""
        return tuple([self.tokens[token] for token in self._token_ids[number].tolist()])
