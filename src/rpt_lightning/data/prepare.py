"""`rpt prepare`: text in, a folder of tasks out."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.benchmark_overlap import benchmark_spans, overlaps
from rpt_lightning.data.corpus import CorpusSource
from rpt_lightning.data.dedup import components, count_shared_spans, split_components
from rpt_lightning.data.manifest import FORMAT, HISTOGRAM_FILE, MANIFEST_FILE, SplitStatistics, plot_histogram, read_manifest, write_manifest
from rpt_lightning.data.proxy import check_proxy, load_tokenizer
from rpt_lightning.data.scored_parts import ScoringSettings, iterate_scores, score_in_parts
from rpt_lightning.data.selection import Item, make_item, select_positions
from rpt_lightning.data.shards import write_split
from rpt_lightning.tasks.token_bytes import TokenBytes, tokenizer_hash
from rpt_lightning.types import Document

# Parts of this many batches: what an interruption costs at most.
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
    benchmark_files: list[str] | None = None,
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

    Every position is scored by a proxy model; those that are uncertain enough become tasks. Interrupted, the same command continues where it stopped.

    Args:
        source: Where the text comes from.
        output_dir: The task folder to make. A finished folder is never overwritten.
        tokenizer: Model folder or hub id whose tokenizer the policy uses.
        proxy: Model folder or hub id that scores positions. It must have the policy's vocabulary.
        entropy_threshold: Train on positions with more entropy than this, in nats over the proxy's 16 most likely tokens.
        heldout_entropy_threshold: The same for held-out positions; 0.5 keeps the easy, medium and hard bands of the paper.
        min_context: Least number of tokens before a position.
        min_true_prob: Learnability band: leave out training positions whose true token the proxy finds less likely than this.
        max_true_prob: Leave out training positions whose true token the proxy finds more likely than this.
        keep_unanswerable: Keep training positions of which no right answer fits into a box. Held-out ones are always kept and flagged.
        answer_reach: Longest right answer in tokens.
        max_tokens_per_document: Cut documents after so many tokens.
        max_documents: Use a random sample of so many documents, held-out ones included.
        heldout_documents: How many documents to hold out, no two of which share 13 tokens in a row with each other or with the training documents.
        benchmark_files: Text or JSONL files; documents that share 13 tokens in a row with one are left out.
        window: Longest input of the proxy in tokens; longer documents are scored in overlapping windows.
        overlap: Least context in tokens of a position in a later window.
        batch_tokens: Tokens the proxy reads at once.
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
        "benchmark_files": benchmark_files,
        "window": window,
        "overlap": overlap,
        "precision": precision,
        "chunk_bytes": chunk_bytes,
        "seed": seed,
    }
    _check_settings(settings)
    output = Path(output_dir)
    if output.exists():
        _accept_finished(output, settings)
        return
    policy_tokenizer = load_tokenizer(tokenizer, flag="--tokenizer")
    start_ids = check_proxy(proxy, policy_tokenizer, tokenizer_name=tokenizer)
    token_bytes = TokenBytes(policy_tokenizer)

    corpus = Corpus(source, token_bytes, min_context=min_context, max_tokens=max_tokens_per_document)
    corpus.drop_benchmark_overlap(benchmark_files or [], token_bytes)
    heldout, train = corpus.split(num_heldout=heldout_documents, max_documents=max_documents, seed=seed)
    order = [*heldout, *train]
    scoring = ScoringSettings(
        proxy=proxy,
        start_ids=start_ids,
        precision=precision,
        window=window,
        overlap=overlap,
        batch_tokens=batch_tokens,
        part_tokens=BATCHES_PER_PART * batch_tokens,
        devices=devices,
        accelerator=accelerator,
    )
    token_ids = [corpus.token_ids[index] for index in order]
    partial = output.with_name(output.name + ".partial")
    parts = partial / _scores_key(token_ids, scoring)
    try:
        tokens_per_s = score_in_parts(token_ids, parts, scoring)
        staging = partial / "folder"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

        statistics = {"heldout": SplitStatistics(), "train": SplitStatistics()}
        scores = iterate_scores(parts, [len(ids) for ids in token_ids], scoring.part_tokens)

        def items(split: str, indices: list[int], threshold: float, low: float, high: float, keep: bool) -> Iterator[Item]:
            count = statistics[split]
            for index, document_scores in zip(indices, itertools.islice(scores, len(indices)), strict=True):
                ids = corpus.token_ids[index]
                # Near a cut the truth beyond it is unknown, so a right answer of several tokens would count as wrong.
                stop = len(ids) - (answer_reach - 1 if corpus.is_cut[index] else 0)
                positions = select_positions(
                    document_scores, entropy_threshold=threshold, min_context=min_context, stop=stop, min_true_prob=low, max_true_prob=high
                )
                item, num_unanswerable = make_item(
                    corpus.documents[index].doc_id,
                    ids,
                    document_scores,
                    positions,
                    token_bytes=token_bytes,
                    reach=answer_reach,
                    keep_unanswerable=keep,
                )
                count.add_scores(document_scores.entropy)
                if len(item["positions"]):
                    count.add_item(item, num_unanswerable)
                    yield item

        # Scores come in the order of ``order``: held out first.
        written = write_split(staging / "heldout", items("heldout", heldout, heldout_entropy_threshold, 0.0, 1.0, True), chunk_bytes=chunk_bytes)
        _require_positions(len(written), "--heldout_entropy_threshold", heldout_entropy_threshold)
        written = write_split(
            staging / "train", items("train", train, entropy_threshold, min_true_prob, max_true_prob, keep_unanswerable), chunk_bytes=chunk_bytes
        )
        _require_positions(len(written), "--entropy_threshold", entropy_threshold)

        policy_tokenizer.save_pretrained(staging / "tokenizer")
        plot_histogram(
            staging / HISTOGRAM_FILE,
            [(split, count.histogram) for split, count in statistics.items()],
            {"train": entropy_threshold, "held out": heldout_entropy_threshold},
        )
        overlap_count = count_shared_spans([corpus.token_ids[i] for i in train], [corpus.token_ids[i] for i in heldout])
        manifest = {
            "format": FORMAT,
            "settings": settings,
            "tokenizer_hash": tokenizer_hash(policy_tokenizer),
            "proxy": proxy,
            "answer_reach": answer_reach,
            "corpus": corpus.counts,
            "splits": {split: count.summary() for split, count in statistics.items()},
            "entropy_histogram": {
                "bin_width_nats": 0.1,
                **{split: count.histogram.tolist() for split, count in statistics.items()},
            },
            "shared_spans_between_splits": overlap_count,
            "scoring_tokens_per_s": round(tokens_per_s, 1),
        }
        if overlap_count:
            raise RuntimeError(f"{overlap_count} spans of 13 tokens stand in both splits: the split is wrong, and nothing was published")
        write_manifest(staging, manifest)
        os.replace(staging, output)
    except KeyboardInterrupt:
        print(f"\nStopped. What was scored is kept in {partial}; the same command continues there.", flush=True)
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"--output_dir {output_dir}: could not write ({error.strerror}); free some space or name another disk, then run it again",
            str(partial),
        ) from error
    shutil.rmtree(partial, ignore_errors=True)
    print(_closing_words(output, manifest), flush=True)


class Corpus:
    """The tokenised documents that may become tasks, without exact duplicates, and how many were left out why."""

    def __init__(self, source: CorpusSource, token_bytes: TokenBytes, *, min_context: int, max_tokens: int | None) -> None:
        self.documents: list[Document] = []
        self.token_ids: list[NDArray[np.int32]] = []
        self.is_cut: list[bool] = []
        digest = hashlib.sha256()
        seen: set[bytes] = set()
        num_read = num_short = num_duplicates = 0
        for document in source.documents():
            num_read += 1
            digest.update(f"{document.doc_id}\0{document.text}\0".encode())
            full = np.array(token_bytes.encode_plain(document.text), dtype=np.int32)
            token_ids = full[:max_tokens]
            if len(token_ids) <= min_context:
                num_short += 1
            elif token_ids.tobytes() in seen:
                num_duplicates += 1
            else:
                seen.add(token_ids.tobytes())
                self.documents.append(document)
                self.token_ids.append(token_ids)
                self.is_cut.append(len(full) > len(token_ids))
        self.counts: dict[str, Any] = {
            "sha256": digest.hexdigest(),
            "documents_read": num_read,
            "too_short": num_short,
            "exact_duplicates": num_duplicates,
        }
        if num_read == 0:
            raise ValueError(f"--source: the corpus is empty ({json.dumps(source.describe())}); check its path, pattern or split")
        if not self.documents:
            raise ValueError(f"--min_context {min_context}: all {num_read} documents are too short to have a position after so many tokens; lower it")
        skipped = getattr(source, "num_skipped_modules", 0)
        if skipped:
            self.counts["modules_that_failed_to_import"] = skipped

    def drop_benchmark_overlap(self, paths: list[str], token_bytes: TokenBytes) -> None:
        """Leave out documents that share a span with a benchmark file."""
        if not paths:
            return
        spans = benchmark_spans(paths, token_bytes)
        kept = [index for index, ids in enumerate(self.token_ids) if not overlaps(ids, spans)]
        self.counts["overlap_with_benchmark_files"] = len(self.documents) - len(kept)
        if not kept:
            raise ValueError(f"--benchmark_files {' '.join(paths)}: every document overlaps with them; nothing is left")
        self.documents = [self.documents[index] for index in kept]
        self.token_ids = [self.token_ids[index] for index in kept]
        self.is_cut = [self.is_cut[index] for index in kept]

    def split(self, *, num_heldout: int, max_documents: int | None, seed: int) -> tuple[list[int], list[int]]:
        """Indices of the held-out and of the training documents, each shuffled: shards in corpus order would make batches of one topic."""
        split = split_components(components(self.token_ids), num_heldout=num_heldout, seed=seed)
        rng = np.random.default_rng([seed, 1])
        heldout, train = rng.permutation(split.heldout).tolist(), rng.permutation(split.train).tolist()
        if max_documents is not None:
            train = train[: max_documents - num_heldout]
        self.counts |= {
            "components": split.num_components,
            "largest_component": split.largest_component,
            "siblings_of_heldout_documents": split.num_heldout_siblings,
            "not_sampled": len(split.train) - len(train),
        }
        print(
            f"{len(self.documents):,} documents in {split.num_components:,} groups that share {13} tokens in a row (largest: {split.largest_component:,}, "
            f"in train); using {len(train):,} for training and {len(heldout):,} held out",
            flush=True,
        )
        return heldout, train


def _check_settings(settings: dict[str, Any]) -> None:
    for name, least in [("min_context", 1), ("answer_reach", 1), ("heldout_documents", 1)]:
        if settings[name] < least:
            raise ValueError(f"--{name} {settings[name]}: must be at least {least}")
    limit = settings["max_tokens_per_document"]
    if limit is not None and limit <= settings["min_context"]:
        raise ValueError(f"--max_tokens_per_document {limit}: leaves nothing after --min_context {settings['min_context']}")
    if settings["max_documents"] is not None and settings["max_documents"] <= settings["heldout_documents"]:
        raise ValueError(f"--max_documents {settings['max_documents']}: must exceed --heldout_documents {settings['heldout_documents']}")
    if settings["min_true_prob"] >= settings["max_true_prob"]:
        raise ValueError(f"--min_true_prob {settings['min_true_prob']}: must be below --max_true_prob {settings['max_true_prob']}")


def _accept_finished(output: Path, settings: dict[str, Any]) -> None:
    """Say that the folder is there already. Raises ValueError where it is something else."""
    if not (output / MANIFEST_FILE).is_file():
        raise ValueError(f"--output_dir {output}: exists and is not a task folder; name another folder or remove it")
    made_with = read_manifest(output)["settings"]
    different = [name for name in settings if made_with.get(name) != json.loads(json.dumps(settings[name]))]
    if different:
        name = different[0]
        raise ValueError(
            f"--output_dir {output}: a task folder made with other settings ({name} {made_with.get(name)!r} instead of {settings[name]!r}); "
            "it is not overwritten: remove it or name another folder"
        )
    print(f"{output} is finished already, with the same settings: nothing to do", flush=True)


def _scores_key(token_ids: list[NDArray[np.int32]], scoring: ScoringSettings) -> str:
    """Names everything that the scores depend on, so that an interrupted run never continues with scores of another one."""
    digest = hashlib.sha256()
    for ids in token_ids:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    digest.update(repr((scoring.proxy, scoring.start_ids, scoring.precision, scoring.window, scoring.overlap, scoring.part_tokens)).encode())
    weights = Path(scoring.proxy)
    if weights.is_dir():  # the same path may hold other weights now
        files = sorted(path for path in weights.iterdir() if path.is_file())
        digest.update(repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]).encode())
    return digest.hexdigest()[:16]


def _require_positions(num_documents: int, flag: str, threshold: float) -> None:
    if num_documents == 0:
        raise ValueError(f"{flag} {threshold}: no position of this split is that uncertain (or allowed by the other limits); lower it")


def _closing_words(output: Path, manifest: dict[str, Any]) -> str:
    train, heldout = manifest["splits"]["train"], manifest["splits"]["heldout"]
    return (
        f"{output}: {train['positions']:,} training positions in {train['documents']:,} documents, {heldout['positions']:,} held-out positions in "
        f"{heldout['documents']:,} ({heldout['unanswerable']:,} of them unanswerable); {manifest['shared_spans_between_splits']} spans of 13 tokens in both splits"
    )
