"""The settings of `rpt prepare`, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpt_lightning.data.prepare.dedup import LEAST_SPAN
from rpt_lightning.data.prepare.position_rule import PositionRule
from rpt_lightning.data.prepare.scored_parts import ScoringSettings
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.flag_bounds import check_number
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.next_token import PLACES as NEXT_TOKEN
from rpt_lightning.types import TokenIds

# A part has this many batches. An interruption costs at most one part.
BATCHES_PER_PART = 8


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The parameters of ``prepare``, which describes them.

    Raises ValueError, with the flag, if a value is out of range.
    """

    source: CorpusSource
    output_dir: str
    tokenizer: str
    proxy: str
    entropy_threshold: float
    heldout_entropy_threshold: float
    min_context: int
    min_true_prob: float
    max_true_prob: float
    max_true_rank: int | None
    keep_unanswerable: bool
    answer_reach: int
    max_tokens_per_document: int | None
    max_documents: int | None
    heldout_documents: int
    dedup_span: int | None
    benchmark_files: list[str] | None
    objective: Objective | None
    random_share: float | None
    window: int
    overlap: int
    batch_tokens: int
    precision: str
    accelerator: str
    devices: int
    chunk_bytes: str
    seed: int

    def __post_init__(self) -> None:
        for name, value in [
            ("min_context", self.min_context),
            ("answer_reach", self.answer_reach),
            ("heldout_documents", self.heldout_documents),
        ]:
            if value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        span = self.dedup_span
        if span is not None and (isinstance(span, bool) or not isinstance(span, int) or span < LEAST_SPAN):
            raise ValueError(
                f"--dedup_span {span}: must be at least {LEAST_SPAN} tokens, "
                "or null (only exact duplicates are left out)"
            )
        limit = self.max_tokens_per_document
        if limit is not None and limit <= self.min_context:
            raise ValueError(
                f"--max_tokens_per_document {limit}: leaves nothing after --min_context {self.min_context}"
            )
        if self.max_documents is not None and self.max_documents <= self.heldout_documents:
            raise ValueError(
                f"--max_documents {self.max_documents}: must exceed "
                f"--heldout_documents {self.heldout_documents}"
            )
        check_number(
            "--max_true_rank", self.max_true_rank, least=0, hint=" (0: the most likely token), or null"
        )
        if not self.min_true_prob < self.max_true_prob:
            raise ValueError(
                f"--min_true_prob {self.min_true_prob}: must be below --max_true_prob {self.max_true_prob}"
            )
        if self.random_share is not None and not 0 < self.random_share <= 1:
            raise ValueError(
                f"--random_share {self.random_share}: give a share above 0 and up to 1, "
                "or null (positions are chosen by entropy)"
            )
        self._check_answers_fit()

    def _check_answers_fit(self) -> None:
        """Raise ValueError if the objective's answers are longer than what is stored or kept of a text."""
        needed = 0 if self.objective is None else self.objective.num_truth_tokens
        name, limit = type(self.objective).__name__, self.max_tokens_per_document
        if needed > self.answer_reach:
            raise ValueError(
                f"--answer_reach {self.answer_reach}: right answers of --objective {name} are found within "
                f"{needed} tokens; give {needed} or more, or set the objective to shorter answers"
            )
        if needed and limit is not None and limit < self.min_context + self.answer_reach:
            raise ValueError(
                f"--max_tokens_per_document {limit}: shorter than a context of --min_context "
                f"{self.min_context} tokens and an answer of --answer_reach {self.answer_reach}, which "
                f"--objective {name} needs; raise it, or lower one of the two"
            )

    @property
    def output(self) -> Path:
        """The task folder."""
        return Path(self.output_dir)

    @property
    def partial(self) -> Path:
        """The folder of the work in progress, beside the task folder."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def stored(self) -> dict[str, Any]:
        """What the manifest stores, by flag: every setting that the folder's content depends on."""
        return {
            "source": self.source.describe(),
            "tokenizer": self.tokenizer,
            "proxy": self.proxy,
            "entropy_threshold": self.entropy_threshold,
            "heldout_entropy_threshold": self.heldout_entropy_threshold,
            "min_context": self.min_context,
            "min_true_prob": self.min_true_prob,
            "max_true_prob": self.max_true_prob,
            "max_true_rank": self.max_true_rank,
            "keep_unanswerable": self.keep_unanswerable,
            "answer_reach": self.answer_reach,
            "max_tokens_per_document": self.max_tokens_per_document,
            "max_documents": self.max_documents,
            "heldout_documents": self.heldout_documents,
            "dedup_span": self.dedup_span,
            "benchmark_files": self.benchmark_files,
            "objective": NEXT_TOKEN if self.objective is None else self.objective.places,
            "random_share": self.random_share,
            "window": self.window,
            "overlap": self.overlap,
            "precision": self.precision,
            "chunk_bytes": self.chunk_bytes,
            "seed": self.seed,
        }

    @property
    def entropy_thresholds(self) -> dict[str, float]:
        """The thresholds that choose positions, by split. Empty if positions are chosen at random."""
        if self.random_share is not None:
            return {}
        return {"train": self.entropy_threshold, "held out": self.heldout_entropy_threshold}

    @property
    def train_rule(self) -> PositionRule:
        return PositionRule(
            entropy_threshold=self.entropy_threshold,
            min_context=self.min_context,
            answer_reach=self.answer_reach,
            keep_unanswerable=self.keep_unanswerable,
            min_true_prob=self.min_true_prob,
            max_true_prob=self.max_true_prob,
            max_true_rank=self.max_true_rank,
            objective=self.objective,
            random_share=self.random_share,
            seed=self.seed,
        )

    @property
    def heldout_rule(self) -> PositionRule:
        return PositionRule(
            entropy_threshold=self.heldout_entropy_threshold,
            min_context=self.min_context,
            answer_reach=self.answer_reach,
            keep_unanswerable=True,
            objective=self.objective,
            random_share=self.random_share,
            seed=self.seed,
        )

    def scoring(self, start_ids: TokenIds, unused_ids: TokenIds) -> ScoringSettings:
        """Return how the proxy scores, given what ``check_proxy`` found out about its tokens."""
        return ScoringSettings(
            proxy=self.proxy,
            start_ids=start_ids,
            unused_ids=unused_ids,
            precision=self.precision,
            window=self.window,
            overlap=self.overlap,
            batch_tokens=self.batch_tokens,
            part_tokens=BATCHES_PER_PART * self.batch_tokens,
            devices=self.devices,
            accelerator=self.accelerator,
        )
