"""How uncertain a proxy model is at every position (paper, section 3.3: entropy over the 16 most likely next tokens)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rpt_lightning.algo.entropy import topk_entropy
from rpt_lightning.types import TokenIds

NUM_CANDIDATES = 16
# Rows of logits that exist at once: 1,024 x 152k x 4 bytes = 620 MB at Qwen's vocabulary.
LOGIT_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class DocumentScores:
    """The proxy's view of each token of a document of ``L`` tokens, given the tokens before it. Row 0 has no context and holds NaN and -1."""

    entropy: NDArray[np.float32]  # [L] nats, over the candidates, renormalised
    true_prob: NDArray[np.float32]  # [L]
    true_rank: NDArray[np.int32]  # [L] 0 = most likely; of equal ones the lower id comes first
    candidate_ids: NDArray[np.int32]  # [L, K] most likely first
    candidate_probs: NDArray[np.float32]  # [L, K]


@dataclass(frozen=True)
class Window:
    """Input tokens ``[start, stop)`` of a document, of which those from ``first`` on predict their successor."""

    document: int
    start: int
    first: int
    stop: int


def windows(num_inputs: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """``(start, first, stop)`` of windows that together score each input once, each with the most context that any window gives it.

    After the first window an input that is scored has at least ``overlap`` tokens in front of its prediction, itself included.

    >>> list(windows(10, window=6, overlap=3))
    [(0, 0, 6), (4, 6, 10)]
    """
    start, first = 0, 0
    while first < num_inputs:
        start = max(0, min(start, num_inputs - window))  # the last window reaches back as far as it can
        stop = min(start + window, num_inputs)
        yield start, first, stop
        first = stop
        start = stop + 1 - overlap


class ProxyScorer:
    """Scores documents with a causal language model.

    Args:
        model: A transformers causal language model in eval mode.
        window: Longest input in tokens, ``start_ids`` not counted.
        overlap: Least number of tokens of context for what a later window scores.
        batch_tokens: Padded tokens of one forward pass.
        start_ids: What the model expects in front of every text, such as a beginning-of-text token.
        autocast: Gives the context of a forward pass.
    """

    def __init__(
        self,
        model: Any,
        *,
        window: int,
        overlap: int,
        batch_tokens: int,
        start_ids: TokenIds = (),
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not 1 <= overlap < window:
            raise ValueError(f"--overlap {overlap}: must be at least 1 and less than --window {window}")
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and window + len(start_ids) > limit:
            raise ValueError(f"--window {window}: the proxy reads at most {limit} tokens; set --window {limit - len(start_ids)} or less")
        self.model = model
        self.window = window
        self.overlap = overlap
        self.batch_tokens = batch_tokens
        self.start_ids = start_ids
        self.autocast = autocast
        self.device = next(model.parameters()).device
        self._check_head()

    def score(self, documents: Sequence[NDArray[np.int32]]) -> list[DocumentScores]:
        """Scores of each document. The result does not depend on what is scored together (up to rounding)."""
        results = [_empty_scores(len(ids)) for ids in documents]
        for batch in self._batches(documents):
            targets = [documents[w.document][w.first + 1 : w.stop + 1] for w in batch]
            fields = self._forward([documents[w.document][w.start : w.stop] for w in batch], [w.first - w.start for w in batch], targets)
            for row, window in enumerate(batch):
                span = slice(window.first + 1, window.stop + 1)
                for name, values in fields.items():
                    getattr(results[window.document], name)[span] = values[row]
        return results

    def _batches(self, documents: Sequence[NDArray[np.int32]]) -> Iterator[list[Window]]:
        """Windows of similar length together, at most ``batch_tokens`` with padding (a single window may exceed it)."""
        pieces = [Window(index, *piece) for index, ids in enumerate(documents) for piece in windows(len(ids) - 1, self.window, self.overlap)]
        pieces.sort(key=lambda w: (w.stop - w.start, w.document, w.start))
        batch: list[Window] = []
        for piece in pieces:
            if batch and (len(batch) + 1) * (piece.stop - piece.start + len(self.start_ids)) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(piece)
        if batch:
            yield batch

    @torch.inference_mode()
    def _forward(self, inputs: list[NDArray[np.int32]], skips: list[int], targets: list[NDArray[np.int32]]) -> dict[str, list[NDArray[Any]]]:
        """The fields of ``DocumentScores`` for each row of a batch, from its ``skips``-th input on."""
        head = len(self.start_ids)
        length = head + max(map(len, inputs))
        ids = torch.zeros(len(inputs), length, dtype=torch.long)  # [N, T]; padding stands right, where a causal model cannot see it
        wanted = torch.zeros(len(inputs), length, dtype=torch.bool)  # [N, T]
        for row, (tokens, skip) in enumerate(zip(inputs, skips, strict=True)):
            ids[row, :head] = torch.tensor(self.start_ids, dtype=torch.long)
            ids[row, head : head + len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            wanted[row, head + skip : head + len(tokens)] = True
        hidden = self._hidden(ids.to(self.device))[wanted.to(self.device)]  # [M, D]
        true_ids = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(self.device)  # [M]
        chunks = [
            self._score_chunk(hidden[start : start + LOGIT_ROWS], true_ids[start : start + LOGIT_ROWS])
            for start in range(0, len(true_ids), LOGIT_ROWS)
        ]
        cuts = np.cumsum([len(row) for row in targets])[:-1]
        return {name: np.split(np.concatenate([chunk[name] for chunk in chunks]), cuts) for name in chunks[0]}

    def _score_chunk(self, hidden: Tensor, true_ids: Tensor) -> dict[str, NDArray[Any]]:
        logits = self._logits(hidden)  # [M, V] fp32
        log_normalizer = logits.logsumexp(-1, keepdim=True)  # [M, 1]
        true_logits = logits.gather(-1, true_ids[:, None])  # [M, 1]
        # Of equal logits argmax takes the first: rank 0 is what a greedy proxy would say.
        is_before = torch.arange(logits.shape[-1], device=logits.device) < true_ids[:, None]  # [M, V]
        top = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1)  # [M, K]
        return {
            "entropy": topk_entropy(top.values, NUM_CANDIDATES).cpu().numpy(),
            "true_prob": (true_logits - log_normalizer).exp()[:, 0].cpu().numpy(),
            "true_rank": (logits > true_logits).logical_or_((logits == true_logits) & is_before).sum(-1).to(torch.int32).cpu().numpy(),
            "candidate_ids": top.indices.to(torch.int32).cpu().numpy(),
            "candidate_probs": (top.values - log_normalizer).exp().cpu().numpy(),
        }

    def _hidden(self, ids: Tensor) -> Tensor:
        with self.autocast():
            hidden: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [N, T, D]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = self.model.get_output_embeddings()(hidden).float()  # [M, V]
        return logits

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Some families scale or cap their logits behind the head: their entropy would be silently wrong here."""
        ids = torch.arange(4, device=self.device)[None]
        with self.autocast():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
        if not torch.allclose(self._logits(self._hidden(ids)), expected, rtol=1e-2, atol=1e-2):
            name = type(self.model).__name__
            raise ValueError(f"--proxy: {name} changes its logits behind the output layer, which scoring does not support; use another proxy")


def _empty_scores(length: int) -> DocumentScores:
    return DocumentScores(
        entropy=np.full(length, np.nan, np.float32),
        true_prob=np.full(length, np.nan, np.float32),
        true_rank=np.full(length, -1, np.int32),
        candidate_ids=np.full((length, NUM_CANDIDATES), -1, np.int32),
        candidate_probs=np.full((length, NUM_CANDIDATES), np.nan, np.float32),
    )
