"""`rpt prepare`: turn text into a folder of tasks."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.prepare.closing_summary import closing_words, shared_words
from rpt_lightning.data.prepare.dedup import SPAN, count_shared_spans
from rpt_lightning.data.prepare.finished_folder import accept_finished
from rpt_lightning.data.prepare.position_rule import PositionRule
from rpt_lightning.data.prepare.proxy_model import check_proxy, load_tokenizer, proxy_fingerprint
from rpt_lightning.data.prepare.proxy_scores import DocumentScores
from rpt_lightning.data.prepare.scored_parts import (
    ScoringSettings,
    iterate_scores,
    score_in_parts,
    scores_key,
)
from rpt_lightning.data.prepare.settings import PrepareSettings
from rpt_lightning.data.prepare.split_statistics import HISTOGRAM_FILE, SplitStatistics, plot_histogram
from rpt_lightning.data.prepare.tokenized_corpus import TokenizedCorpus
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.data.store.item_format import FIELDS, Item, item_digest
from rpt_lightning.data.store.manifest import Manifest, write_manifest
from rpt_lightning.data.store.shards import folder_checksums, write_split
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.split_documents import SplitDocuments
from rpt_lightning.pretrained.token_bytes import TokenBytes, tokenizer_hash


def prepare(
    source: CorpusSource,
    output_dir: str,
    tokenizer: str,
    proxy: str,
    *,
    entropy_threshold: float = 1.0,
    heldout_entropy_threshold: float = 0.5,
    min_context: int = 16,
    min_true_prob: float = 0.0,
    max_true_prob: float = 1.0,
    max_true_rank: int | None = None,
    keep_unanswerable: bool = False,
    answer_reach: int = 8,
    max_tokens_per_document: int | None = None,
    max_documents: int | None = None,
    heldout_documents: int = 200,
    dedup_span: int | None = SPAN,
    benchmark_files: list[str] | None = None,
    objective: Objective | None = None,
    random_share: float | None = None,
    window: int = 2048,
    overlap: int = 512,
    batch_tokens: int = 8192,
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "bf16-mixed",
    accelerator: str = "auto",
    devices: int = 1,
    chunk_bytes: str = "64MB",
    seed: int = 0,
) -> None:
    """Turn a text corpus into a folder of next-token reasoning tasks.

    A proxy model scores every position, and the positions that are uncertain enough become tasks. If the
    command is interrupted, the same command continues where it stopped.

    Args:
        source: Source of the text.
        output_dir: The task folder to make. A finished folder is never overwritten.
        tokenizer: Model folder or hub id whose tokenizer the policy uses.
        proxy: Model folder or hub id that scores positions. It must have the policy's vocabulary.
        entropy_threshold: Train on positions whose entropy is higher than this, in nats. The entropy is over
            the proxy's 16 most likely tokens.
        heldout_entropy_threshold: The same for held-out positions. 0.5 keeps all positions that the paper
            calls easy, medium or hard.
        min_context: Minimum number of tokens before a position.
        min_true_prob: Lower end of the learnability band. Leave out training positions whose true token is
            less likely than this according to the proxy.
        max_true_prob: Upper end of the learnability band. Leave out training positions whose true token is
            more likely than this according to the proxy.
        max_true_rank: Leave out training positions whose true token has a higher rank than this according to
            the proxy (0 is the most likely token). With a low max_true_prob, this keeps positions that are
            hard but inferable, because the truth is unlikely but still among the candidates.
            null sets no limit.
        keep_unanswerable: Keep training positions for which no right answer fits into a box. Held-out ones
            are always kept and flagged.
        answer_reach: Length of the longest right answer, in tokens.
        max_tokens_per_document: Truncate documents to this many tokens.
        max_documents: Use a random sample of this many documents, including the held-out ones.
        heldout_documents: Number of documents to hold out. No two of them share dedup_span consecutive tokens
            with each other, and none shares them with a training document. Ignored if the source itself says
            which documents are held out, as OwnTraces does.
        dedup_span: Keep documents that share this many consecutive tokens on the same side of the split. With
            null, only exact duplicates are left out. That is right for text made from templates (logs, code,
            generated text), where every document shares long spans with every other.
        benchmark_files: Text or JSONL files. Documents that share 13 consecutive tokens with one of them are
            left out.
        objective: Objective that will turn the positions into tasks, e.g. a class of your own. It may reject
            positions. null means next-token reasoning.
        random_share: Choose positions at random instead of by entropy. Each position, in either split, is
            chosen with this probability, and the two entropy thresholds have no effect.
            null chooses by entropy.
        window: Longest input of the proxy in tokens. Longer documents are scored in overlapping windows.
        overlap: Minimum number of context tokens that a position has in every window after the first.
        batch_tokens: Number of tokens that the proxy reads in one batch.
        precision: Precision of the proxy, in Lightning Fabric's names.
        accelerator: Accelerator of the proxy, in Lightning Fabric's names.
        devices: Number of scoring processes, each with its own device.
        chunk_bytes: Size of a shard.
        seed: Seed of the split, the sample and the order of the shards.
    """
    prepare_folder(
        PrepareSettings(
            source=source,
            output_dir=output_dir,
            tokenizer=tokenizer,
            proxy=proxy,
            entropy_threshold=entropy_threshold,
            heldout_entropy_threshold=heldout_entropy_threshold,
            min_context=min_context,
            min_true_prob=min_true_prob,
            max_true_prob=max_true_prob,
            max_true_rank=max_true_rank,
            keep_unanswerable=keep_unanswerable,
            answer_reach=answer_reach,
            max_tokens_per_document=max_tokens_per_document,
            max_documents=max_documents,
            heldout_documents=heldout_documents,
            dedup_span=dedup_span,
            benchmark_files=benchmark_files,
            objective=objective,
            random_share=random_share,
            window=window,
            overlap=overlap,
            batch_tokens=batch_tokens,
            precision=precision,
            accelerator=accelerator,
            devices=devices,
            chunk_bytes=chunk_bytes,
            seed=seed,
        )
    )


def prepare_folder(settings: PrepareSettings) -> None:
    """Make the task folder: choose documents, score them, write their positions, check and publish."""
    if settings.output.exists():
        accept_finished(settings)
        return
    tokenizer = load_tokenizer(settings.tokenizer, flag="--tokenizer")
    scoring = settings.scoring(*check_proxy(settings.proxy, tokenizer, tokenizer_name=settings.tokenizer))
    token_bytes = TokenBytes(tokenizer)
    chosen = _choose(settings, token_bytes)
    with _clear_words(settings):
        scores = _score(chosen, scoring, settings.partial)
        staging = settings.partial / "folder"
        shutil.rmtree(staging, ignore_errors=True)
        written = _write_splits(staging, chosen, scores.documents, settings, token_bytes)
        tokenizer.save_pretrained(staging / "tokenizer")
        plot_histogram(
            staging / HISTOGRAM_FILE,
            {"train": written.train.histogram, "held out": written.heldout.histogram},
            settings.entropy_thresholds,
        )
        manifest = Manifest(
            settings=settings.stored,
            tokenizer_hash=tokenizer_hash(tokenizer),
            proxy=settings.proxy,
            proxy_fingerprint=proxy_fingerprint(settings.proxy),
            answer_reach=settings.answer_reach,
            corpus=chosen.corpus.counts,
            shared_spans_between_splits=_check_apart(chosen, settings.dedup_span),
            splits={"train": written.train.summary(), "heldout": written.heldout.summary()},
            sha256={part: folder_checksums(staging / part) for part in ("train", "heldout", "tokenizer")},
            scoring_tokens_per_s=round(scores.tokens_per_s, 1),
        )
        write_manifest(staging, manifest)
        _read_back(staging, written, settings.output)
        os.replace(staging, settings.output)
    shutil.rmtree(settings.partial, ignore_errors=True)
    print(closing_words(settings.output, manifest), flush=True)


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The documents of a corpus that are used, by their indices."""

    corpus: TokenizedCorpus
    heldout: list[int]
    train: list[int]

    def token_ids(self, indices: list[int]) -> list[NDArray[np.int32]]:
        return [self.corpus.token_ids[index] for index in indices]


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """The scores of the chosen documents, which can be read once: held-out documents come first."""

    documents: Iterator[DocumentScores]
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class _Written:
    """Statistics of the two splits that were written."""

    train: SplitStatistics
    heldout: SplitStatistics


def _choose(settings: PrepareSettings, token_bytes: TokenBytes) -> _Chosen:
    """Read the source, and choose the documents that are held out and those that train."""
    corpus = TokenizedCorpus(
        settings.source,
        token_bytes,
        min_context=settings.min_context,
        max_tokens=settings.max_tokens_per_document,
    )
    corpus.drop_benchmark_overlap(settings.benchmark_files or [], token_bytes)
    heldout, train = corpus.split(
        num_heldout=settings.heldout_documents,
        max_documents=settings.max_documents,
        span=settings.dedup_span,
        seed=settings.seed,
    )
    return _Chosen(corpus=corpus, heldout=heldout, train=train)


def _score(chosen: _Chosen, scoring: ScoringSettings, partial: Path) -> _Scores:
    """Score the documents with the proxy, except those that an interrupted run has scored."""
    documents = chosen.token_ids([*chosen.heldout, *chosen.train])
    parts = partial / scores_key(documents, scoring)
    tokens_per_s = score_in_parts(documents, parts, scoring)
    scores = iterate_scores(parts, [len(ids) for ids in documents], scoring.part_tokens)
    return _Scores(documents=scores, tokens_per_s=tokens_per_s)


def _write_splits(
    staging: Path,
    chosen: _Chosen,
    scores: Iterator[DocumentScores],
    settings: PrepareSettings,
    token_bytes: TokenBytes,
) -> _Written:
    """Write both splits, in the order of the scores."""

    def write(split: str, indices: list[int], rule: PositionRule, flag: str) -> SplitStatistics:
        statistics = SplitStatistics()
        items = _items(
            chosen.corpus, indices, itertools.islice(scores, len(indices)), rule, token_bytes, statistics
        )
        write_split(staging / split, items, chunk_bytes=settings.chunk_bytes)
        if statistics.num_documents == 0:
            limit, change = (
                (f"{flag} {rule.entropy_threshold}", "lower it")
                if rule.random_share is None
                else (f"--random_share {rule.random_share}", "raise it")
            )
            raise ValueError(
                f"{limit}: no position of the {split} documents passes it and the other limits; "
                f"{change}{_about_objective(rule, statistics)}"
            )
        return statistics

    heldout = write("heldout", chosen.heldout, settings.heldout_rule, "--heldout_entropy_threshold")
    train = write("train", chosen.train, settings.train_rule, "--entropy_threshold")
    return _Written(train=train, heldout=heldout)


def _items(
    corpus: TokenizedCorpus,
    indices: list[int],
    scores: Iterator[DocumentScores],
    rule: PositionRule,
    token_bytes: TokenBytes,
    statistics: SplitStatistics,
) -> Iterator[Item]:
    """Yield the documents that have a position, and count all of them."""
    documents = SplitDocuments(
        [corpus.doc_ids[index] for index in indices],
        [corpus.token_ids[index] for index in indices],
        [corpus.is_cut[index] for index in indices],
        token_bytes,
    )
    for number, (index, document_scores) in enumerate(zip(indices, scores, strict=True)):
        statistics.add_scores(document_scores.entropy)
        item, left_out = rule.item(documents, number, corpus.token_ids[index], document_scores)
        statistics.num_without_material += left_out.without_material
        if corpus.has_fields:
            fields = corpus.fields[index]
            item[FIELDS] = None if fields is None else fields.at(item["positions"])
        if len(item["positions"]):
            statistics.add_item(item, left_out.unanswerable)
            yield item


def _about_objective(rule: PositionRule, statistics: SplitStatistics) -> str:
    """Say what an objective asks for and what it left out, if there is one."""
    if rule.objective is None:
        return ""
    name, count = type(rule.objective).__name__, statistics.num_without_material
    missing = f", and has no material for {count:,} of the positions that pass" if count else ""
    return f", or give another --objective than {name}, which asks about {rule.objective.places}{missing}"


def _check_apart(chosen: _Chosen, span: int | None) -> int:
    """Count what both splits hold, which is 0. Raises RuntimeError if it is not."""
    shared = count_shared_spans(chosen.token_ids(chosen.train), chosen.token_ids(chosen.heldout), span)
    if shared:
        raise RuntimeError(f"{shared_words(shared, span)}: the split is wrong, and nothing was published")
    return shared


def _read_back(staging: Path, written: _Written, output: Path) -> None:
    """Open the folder as a run does and compare every document with what was written.

    Raises RuntimeError if they differ, so that nothing is published.
    """
    try:
        for folder, statistics in [
            (TaskFolder(staging, "train"), written.train),
            (TaskFolder(staging, "heldout"), written.heldout),
        ]:
            folder.tokenizer_hash  # noqa: B018, raises ValueError if the stored tokenizer is another
            if [item_digest(folder.document(index)) for index in range(len(folder))] != statistics.digests:
                raise ValueError(f"{folder.split}/ holds documents that differ from those written")
            folder.task(0, 0)
    except ValueError as error:
        raise RuntimeError(
            f"--output_dir {output}: what was written is not what is read back, "
            f"so nothing was published ({error})"
        ) from error


@contextmanager
def _clear_words(settings: PrepareSettings) -> Iterator[None]:
    """Say what an interruption left behind, and name the disk if it is full.

    Whatever is left behind is checked before it is used again.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"\nStopped. The scores so far are kept in {settings.partial}; the same command continues there.",
            flush=True,
        )
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: --output_dir {settings.output} is not finished. Free some space "
            f"and run the same command again (the scores so far are kept in {settings.partial}), "
            "or name a folder on another disk",
        ) from error
