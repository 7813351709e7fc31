"""Measure how uncertain a proxy model is at every position.

The measure is the entropy over the 16 most likely next tokens (paper, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rpt_lightning.data.prepare.token_scores import score_logits
from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.types import TokenIds

NUM_CANDIDATES = 16
# Rows of logits that exist at once: 1,024 x 152k x 4 bytes = 620 MB with Qwen's vocabulary in fp32. With
# fewer rows the head's matrix product is slower.
LOGIT_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class DocumentScores:
    """The proxy's scores of each token of a document of ``L`` tokens, given the tokens before it.

    Row 0 has no context and holds NaN and -1.
    """

    entropy: NDArray[np.float32]  # [L] nats, over the candidates, renormalised
    true_prob: NDArray[np.float32]  # [L]
    true_rank: NDArray[np.int32]  # [L] 0 = most likely; of equally likely tokens the lower id comes first
    candidate_ids: NDArray[np.int32]  # [L, K] most likely first
    candidate_probs: NDArray[np.float32]  # [L, K]


@dataclass(frozen=True)
class Window:
    """Input tokens ``[start, stop)`` of a document. Those from ``first`` on predict their successor."""

    document: int
    start: int
    first: int
    stop: int


def windows(num_inputs: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, first, stop)`` of windows that together score each input once.

    Each input is scored with the most context that any window gives it. After the first window, a scored
    input has at least ``overlap`` tokens before its prediction, including itself.

    >>> list(windows(10, window=6, overlap=3))
    [(0, 0, 6), (4, 6, 10)]
    """
    start, first = 0, 0
    while first < num_inputs:
        start = max(0, min(start, num_inputs - window))  # the last window reaches back as far as possible
        stop = min(start + window, num_inputs)
        yield start, first, stop
        first = stop
        start = stop + 1 - overlap


class ProxyScorer:
    """Score documents with a causal language model.

    Args:
        model: A transformers causal language model in eval mode.
        window: Longest input in tokens, not counting ``start_ids``.
        overlap: Least number of tokens of context for the positions that a later window scores.
        batch_tokens: Number of tokens in one forward pass, including padding.
        start_ids: Tokens that the model expects before every text, such as a beginning-of-text token.
        unused_ids: Rows of the model's vocabulary that are not tokens. The scores equal those of a model
            without these rows.
        autocast: Returns the context manager for a forward pass.
    """

    def __init__(
        self,
        model: Any,
        *,
        window: int,
        overlap: int,
        batch_tokens: int,
        start_ids: TokenIds = (),
        unused_ids: TokenIds = (),
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not 1 <= overlap < window:
            raise ValueError(f"--overlap {overlap}: must be at least 1 and less than --window {window}")
        limit = longest_context(model.config)
        if limit is not None and window + len(start_ids) > limit:
            raise ValueError(
                f"--window {window}: the proxy reads at most {limit} tokens; "
                f"set --window {limit - len(start_ids)} or less"
            )
        self.model = model
        self.window = window
        self.overlap = overlap
        self.batch_tokens = batch_tokens
        self.start_ids = start_ids
        self.autocast = autocast
        self.device = next(model.parameters()).device
        self._unused = torch.tensor(unused_ids, dtype=torch.long, device=self.device)  # [U]
        self._check_head()

    def score(self, documents: Sequence[NDArray[np.int32]]) -> list[DocumentScores]:
        """Score each document. The result does not depend on what is scored together (up to rounding)."""
        results = [_empty_scores(len(ids)) for ids in documents]
        for batch in self._batches(documents):
            targets = [documents[w.document][w.first + 1 : w.stop + 1] for w in batch]
            fields = self._forward(
                [documents[w.document][w.start : w.stop] for w in batch],
                [w.first - w.start for w in batch],
                targets,
            )
            for row, window in enumerate(batch):
                span = slice(window.first + 1, window.stop + 1)
                for name, values in fields.items():
                    getattr(results[window.document], name)[span] = values[row]
        return results

    def _batches(self, documents: Sequence[NDArray[np.int32]]) -> Iterator[list[Window]]:
        """Group windows of similar length.

        A batch has at most ``batch_tokens`` with padding, unless a single window exceeds this.
        """
        pieces = [
            Window(index, *piece)
            for index, ids in enumerate(documents)
            for piece in windows(len(ids) - 1, self.window, self.overlap)
        ]
        pieces.sort(key=lambda w: (w.stop - w.start, w.document, w.start))
        batch: list[Window] = []
        for piece in pieces:
            if (
                batch
                and (len(batch) + 1) * (piece.stop - piece.start + len(self.start_ids)) > self.batch_tokens
            ):
                yield batch
                batch = []
            batch.append(piece)
        if batch:
            yield batch

    @torch.inference_mode()
    def _forward(
        self, inputs: list[NDArray[np.int32]], skips: list[int], targets: list[NDArray[np.int32]]
    ) -> dict[str, list[NDArray[Any]]]:
        """Compute the fields of ``DocumentScores`` for each row, from its ``skips``-th input on."""
        head = len(self.start_ids)
        length = head + max(map(len, inputs))
        # [N, T]; the padding is on the right, where a causal model cannot see it
        ids = torch.zeros(len(inputs), length, dtype=torch.long)
        wanted = torch.zeros(len(inputs), length, dtype=torch.bool)  # [N, T]
        for row, (tokens, skip) in enumerate(zip(inputs, skips, strict=True)):
            ids[row, :head] = torch.tensor(self.start_ids, dtype=torch.long)
            ids[row, head : head + len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            wanted[row, head + skip : head + len(tokens)] = True
        true_ids = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(self.device)  # [M]
        with self.autocast():  # a single context: the head's weight is cast once, not once per chunk
            hidden = self._hidden(ids.to(self.device))[wanted.to(self.device)]  # [M, D]
            chunks = [
                score_logits(self._token_logits(rows), true, NUM_CANDIDATES)
                for rows, true in zip(
                    torch.split(hidden, LOGIT_ROWS), torch.split(true_ids, LOGIT_ROWS), strict=True
                )
            ]
        fields = {name: torch.cat([chunk[name] for chunk in chunks]).cpu().numpy() for name in chunks[0]}
        cuts = np.cumsum([len(row) for row in targets])[:-1]
        return {name: np.split(values, cuts) for name, values in fields.items()}

    def _hidden(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [N, T, D]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # [M, V]
        return logits

    def _token_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits. A row that is not a token gets a probability of 0."""
        logits = self._logits(hidden)  # [M, V]
        if len(self._unused):
            logits.index_fill_(1, self._unused, float("-inf"))
        return logits

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Check that the model leaves its logits unchanged after the output layer.

        Some families scale or cap them there. Their entropy would be silently wrong here.
        """
        ids = torch.arange(4, device=self.device)[None]
        with self.autocast():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
            actual = self._logits(self._hidden(ids)).float()
        if not torch.allclose(actual, expected, rtol=1e-2, atol=1e-2):
            name = type(self.model).__name__
            raise ValueError(
                f"--proxy: {name} changes its logits after the output layer, which scoring does not support; "
                "use another proxy"
            )


def _empty_scores(length: int) -> DocumentScores:
    return DocumentScores(
        entropy=np.full(length, np.nan, np.float32),
        true_prob=np.full(length, np.nan, np.float32),
        true_rank=np.full(length, -1, np.int32),
        candidate_ids=np.full((length, NUM_CANDIDATES), -1, np.int32),
        candidate_probs=np.full((length, NUM_CANDIDATES), np.nan, np.float32),
    )
