"""`rpt prepare`: turn text into a folder of tasks."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rpt_lightning.data.prepare.closing_words import closing_words, shared_words
from rpt_lightning.data.prepare.dedup import LEAST_SPAN, SPAN, count_shared_spans
from rpt_lightning.data.prepare.position_rule import PositionRule
from rpt_lightning.data.prepare.proxy_model import (
    check_proxy,
    load_tokenizer,
    proxy_fingerprint,
)
from rpt_lightning.data.prepare.proxy_scores import DocumentScores
from rpt_lightning.data.prepare.scored_parts import (
    ScoringSettings,
    iterate_scores,
    score_in_parts,
    scores_key,
)
from rpt_lightning.data.prepare.tokenized_corpus import TokenizedCorpus, source_sha256
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.data.store.item_format import FIELDS, Item, item_digest
from rpt_lightning.data.store.manifest import (
    FORMAT,
    HISTOGRAM_FILE,
    LATER_SETTINGS,
    MANIFEST_FILE,
    SplitStatistics,
    plot_histogram,
    read_manifest,
    write_manifest,
)
from rpt_lightning.data.store.shards import check_split, folder_checksums, write_split
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.next_token import PLACES as NEXT_TOKEN
from rpt_lightning.pretrained.token_bytes import TokenBytes, tokenizer_hash

# A part has this many batches. An interruption costs at most one part.
BATCHES_PER_PART = 8


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
    keep_unanswerable: bool = False,
    answer_reach: int = 8,
    max_tokens_per_document: int | None = None,
    max_documents: int | None = None,
    heldout_documents: int = 200,
    dedup_span: int | None = SPAN,
    benchmark_files: list[str] | None = None,
    objective: Objective | None = None,
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
        entropy_threshold: Train on positions with more entropy than this, in nats over the proxy's 16 most
            likely tokens.
        heldout_entropy_threshold: The same for held-out positions. 0.5 keeps the easy, medium and hard bands
            of the paper.
        min_context: Least number of tokens before a position.
        min_true_prob: Lower end of the learnability band. Leave out training positions whose true token is
            less likely than this according to the proxy.
        max_true_prob: Upper end of the learnability band. Leave out training positions whose true token is
            more likely than this according to the proxy.
        keep_unanswerable: Keep training positions for which no right answer fits into a box. Held-out ones
            are always kept and flagged.
        answer_reach: Longest right answer in tokens.
        max_tokens_per_document: Truncate documents to this many tokens.
        max_documents: Use a random sample of this many documents, including the held-out ones.
        heldout_documents: Number of documents to hold out. No two of them share dedup_span consecutive tokens
            with each other, and none shares them with a training document.
        dedup_span: Keep documents that share this many consecutive tokens on one side of the split. With
            null, only exact duplicates are left out. That is right for text made from templates (logs, code,
            generated text), where every document shares long spans with every other.
        benchmark_files: Text or JSONL files. Documents that share 13 consecutive tokens with one of them are
            left out.
        objective: Objective whose tasks the positions will be, e.g. a class of your own. It may refuse
            positions. None keeps them for next-token reasoning.
        window: Longest input of the proxy in tokens. Longer documents are scored in overlapping windows.
        overlap: Least context in tokens of a position in a later window.
        batch_tokens: Number of tokens that the proxy reads at once.
        precision: Precision of the proxy, in Lightning Fabric's names.
        accelerator: Accelerator of the proxy, in Lightning Fabric's names.
        devices: Number of scoring processes, each with its own device.
        chunk_bytes: Size of a shard.
        seed: Seed of the split, the sample and the order of the shards.
    """
    settings: dict[str, Any] = {
        "source": source.describe(),
        "tokenizer": tokenizer,
        "proxy": proxy,
        "entropy_threshold": entropy_threshold,
        "heldout_entropy_threshold": heldout_entropy_threshold,
        "min_context": min_context,
        "min_true_prob": min_true_prob,
        "max_true_prob": max_true_prob,
        "keep_unanswerable": keep_unanswerable,
        "answer_reach": answer_reach,
        "max_tokens_per_document": max_tokens_per_document,
        "max_documents": max_documents,
        "heldout_documents": heldout_documents,
        "dedup_span": dedup_span,
        "benchmark_files": benchmark_files,
        "objective": NEXT_TOKEN if objective is None else objective.places,
        "window": window,
        "overlap": overlap,
        "precision": precision,
        "chunk_bytes": chunk_bytes,
        "seed": seed,
    }
    _check_settings(settings)
    output = Path(output_dir)
    if output.exists():
        _accept_finished(output, settings, source)
        return
    policy_tokenizer = load_tokenizer(tokenizer, flag="--tokenizer")
    start_ids, unused_ids = check_proxy(proxy, policy_tokenizer, tokenizer_name=tokenizer)
    token_bytes = TokenBytes(policy_tokenizer)
    corpus = TokenizedCorpus(source, token_bytes, min_context=min_context, max_tokens=max_tokens_per_document)
    corpus.drop_benchmark_overlap(benchmark_files or [], token_bytes)
    heldout, train = corpus.split(
        num_heldout=heldout_documents, max_documents=max_documents, span=dedup_span, seed=seed
    )
    scoring = ScoringSettings(
        proxy=proxy,
        start_ids=start_ids,
        unused_ids=unused_ids,
        precision=precision,
        window=window,
        overlap=overlap,
        batch_tokens=batch_tokens,
        part_tokens=BATCHES_PER_PART * batch_tokens,
        devices=devices,
        accelerator=accelerator,
    )
    heldout_rule = PositionRule(
        entropy_threshold=heldout_entropy_threshold,
        min_context=min_context,
        answer_reach=answer_reach,
        keep_unanswerable=True,
        objective=objective,
    )
    train_rule = PositionRule(
        entropy_threshold=entropy_threshold,
        min_context=min_context,
        answer_reach=answer_reach,
        keep_unanswerable=keep_unanswerable,
        min_true_prob=min_true_prob,
        max_true_prob=max_true_prob,
        objective=objective,
    )
    partial = output.with_name(output.name + ".partial")
    with _clear_words(output, partial):
        documents = [corpus.token_ids[index] for index in (*heldout, *train)]
        parts = partial / scores_key(documents, scoring)
        tokens_per_s = score_in_parts(documents, parts, scoring)
        scores = iterate_scores(parts, [len(ids) for ids in documents], scoring.part_tokens)
        staging = partial / "folder"
        shutil.rmtree(staging, ignore_errors=True)
        # The scores come in this order: held-out documents first.
        heldout_statistics = _write_split(
            staging / "heldout", corpus, heldout, scores, heldout_rule, token_bytes, chunk_bytes
        )
        train_statistics = _write_split(
            staging / "train", corpus, train, scores, train_rule, token_bytes, chunk_bytes
        )
        policy_tokenizer.save_pretrained(staging / "tokenizer")
        plot_histogram(
            staging / HISTOGRAM_FILE,
            {"train": train_statistics.histogram, "held out": heldout_statistics.histogram},
            {"train": entropy_threshold, "held out": heldout_entropy_threshold},
        )
        shared_spans = count_shared_spans(
            [corpus.token_ids[i] for i in train], [corpus.token_ids[i] for i in heldout], dedup_span
        )
        if shared_spans:
            raise RuntimeError(
                f"{shared_words(shared_spans, dedup_span)}: the split is wrong, and nothing was published"
            )
        manifest = {
            "format": FORMAT,
            "settings": settings,
            "tokenizer_hash": tokenizer_hash(policy_tokenizer),
            "proxy": proxy,
            "proxy_fingerprint": proxy_fingerprint(proxy),
            "answer_reach": answer_reach,
            "corpus": corpus.counts,
            "shared_spans_between_splits": shared_spans,
            "splits": {"train": train_statistics.summary(), "heldout": heldout_statistics.summary()},
            "sha256": {part: folder_checksums(staging / part) for part in ("train", "heldout", "tokenizer")},
            "scoring_tokens_per_s": round(tokens_per_s, 1),
        }
        write_manifest(staging, manifest)
        _read_back(
            staging, {"train": train_statistics.digests, "heldout": heldout_statistics.digests}, output
        )
        os.replace(staging, output)
    shutil.rmtree(partial, ignore_errors=True)
    print(closing_words(output, manifest), flush=True)


def _write_split(
    folder: Path,
    corpus: TokenizedCorpus,
    indices: list[int],
    scores: Iterator[DocumentScores],
    rule: PositionRule,
    token_bytes: TokenBytes,
    chunk_bytes: str,
) -> SplitStatistics:
    """Write the documents that have a position. Takes the scores of all ``indices`` from the iterator."""
    statistics = SplitStatistics()

    def items() -> Iterator[Item]:
        for index, document_scores in zip(indices, itertools.islice(scores, len(indices)), strict=True):
            statistics.add_scores(document_scores.entropy)
            item, num_unanswerable = rule.item(
                corpus.doc_ids[index],
                corpus.token_ids[index],
                document_scores,
                is_cut=corpus.is_cut[index],
                token_bytes=token_bytes,
            )
            if corpus.has_fields:
                fields = corpus.fields[index]
                item[FIELDS] = None if fields is None else fields.at(item["positions"])
            if len(item["positions"]):
                statistics.add_item(item, num_unanswerable)
                yield item

    write_split(folder, items(), chunk_bytes=chunk_bytes)
    if statistics.num_documents == 0:
        flag = "--entropy_threshold" if folder.name == "train" else "--heldout_entropy_threshold"
        raise ValueError(
            f"{flag} {rule.entropy_threshold}: no position of the {folder.name} documents passes it "
            "and the other limits; lower it"
        )
    return statistics


def _read_back(staging: Path, digests: dict[str, list[bytes]], output: Path) -> None:
    """Open the folder as a run does and compare every document with what was written.

    Raises RuntimeError if they differ, so that nothing is published.
    """
    try:
        for split, expected in digests.items():
            folder = TaskFolder(staging, "train" if split == "train" else "heldout")
            folder.tokenizer_hash  # noqa: B018, raises ValueError if the stored tokenizer is another
            if [item_digest(folder.document(index)) for index in range(len(folder))] != expected:
                raise ValueError(f"{split}/ holds documents that differ from those written")
            folder.task(0, 0)
    except ValueError as error:
        raise RuntimeError(
            f"--output_dir {output}: what was written is not what is read back, "
            f"so nothing was published ({error})"
        ) from error


@contextmanager
def _clear_words(output: Path, partial: Path) -> Iterator[None]:
    """Say what an interruption left behind, and name the disk if it is full.

    Whatever is left behind is checked before it is used again.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"\nStopped. The scores so far are kept in {partial}; the same command continues there.",
            flush=True,
        )
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: --output_dir {output} is not finished. Free some space and run the same "
            f"command again (the scores so far are kept in {partial}), or name a folder on another disk",
        ) from error


def _check_settings(settings: dict[str, Any]) -> None:
    for name, least in [("min_context", 1), ("answer_reach", 1), ("heldout_documents", 1)]:
        if settings[name] < least:
            raise ValueError(f"--{name} {settings[name]}: must be at least {least}")
    span = settings["dedup_span"]
    if span is not None and (isinstance(span, bool) or not isinstance(span, int) or span < LEAST_SPAN):
        raise ValueError(
            f"--dedup_span {span}: must be at least {LEAST_SPAN} tokens, "
            "or null (only exact duplicates are left out)"
        )
    limit = settings["max_tokens_per_document"]
    if limit is not None and limit <= settings["min_context"]:
        raise ValueError(
            f"--max_tokens_per_document {limit}: leaves nothing after --min_context {settings['min_context']}"
        )
    if settings["max_documents"] is not None and settings["max_documents"] <= settings["heldout_documents"]:
        raise ValueError(
            f"--max_documents {settings['max_documents']}: must exceed "
            f"--heldout_documents {settings['heldout_documents']}"
        )
    if settings["min_true_prob"] >= settings["max_true_prob"]:
        raise ValueError(
            f"--min_true_prob {settings['min_true_prob']}: must be below "
            f"--max_true_prob {settings['max_true_prob']}"
        )


def _accept_finished(output: Path, settings: dict[str, Any], source: CorpusSource) -> None:
    """Report that the folder already exists. Raises ValueError if it differs from what was asked for."""
    if not (output / MANIFEST_FILE).is_file():
        raise ValueError(
            f"--output_dir {output}: exists and is not a task folder; name another folder or remove it"
        )
    manifest = read_manifest(output)
    made_with = LATER_SETTINGS | manifest["settings"]
    different = [name for name in settings if made_with.get(name) != json.loads(json.dumps(settings[name]))]
    if different:
        name = different[0]
        raise ValueError(
            f"--output_dir {output}: a task folder made with other settings "
            f"({name} {made_with.get(name)!r} instead of {settings[name]!r}); "
            "it is not overwritten: remove it or name another folder"
        )
    fingerprint = proxy_fingerprint(settings["proxy"])
    for what, is_same in [
        (
            f"weights of --proxy {settings['proxy']!r}",
            manifest.get("proxy_fingerprint", fingerprint) == fingerprint,
        ),
        ("text of --source", manifest["corpus"]["sha256"] == source_sha256(source)),
    ]:
        if not is_same:
            raise ValueError(
                f"--output_dir {output}: a task folder made with different {what}; "
                "remove it or name another folder"
            )
    try:
        for split in ("train", "heldout"):
            check_split(output / split)
    except ValueError as error:
        raise ValueError(
            f"--output_dir {output}: a task folder with the same settings, which cannot be read: "
            f"remove it or name another folder ({error})"
        ) from error
    # A run that was stopped at its very end may have left this folder.
    shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
    print(f"{output} is already finished, with the same settings: nothing to do", flush=True)
