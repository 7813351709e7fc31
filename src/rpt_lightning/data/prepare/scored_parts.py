"""Scoring that survives an interruption.

Documents are scored in parts, and each part is a file that exists either complete or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.prepare.proxy_model import proxy_fingerprint
from rpt_lightning.data.prepare.proxy_scores import DocumentScores, ProxyScorer
from rpt_lightning.data.store.shards import replace_file
from rpt_lightning.types import TokenIds

TOKENS_FILE = "tokens.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """The settings that determine the scores of given tokens, and those that only affect speed.

    They are sent to every scoring process. ``unused_ids`` are the rows of the proxy's vocabulary that are not
    tokens. ``precision`` is one of Fabric's names (32-true, bf16-mixed, bf16-true). ``devices`` is the number
    of processes.
    """

    proxy: str
    start_ids: TokenIds
    unused_ids: TokenIds
    precision: str
    window: int
    overlap: int
    batch_tokens: int
    part_tokens: int
    devices: int
    accelerator: str


def part_bounds(lengths: Sequence[int], part_tokens: int) -> list[tuple[int, int]]:
    """Group consecutive documents ``[start, stop)`` into parts of about ``part_tokens`` tokens.

    >>> part_bounds([5, 5, 5, 20, 1], 10)
    [(0, 2), (2, 4), (4, 5)]
    """
    bounds, start, tokens = [], 0, 0
    for index, length in enumerate(lengths, start=1):
        tokens += length
        if tokens >= part_tokens or index == len(lengths):
            bounds.append((start, index))
            start, tokens = index, 0
    return bounds


def score_in_parts(documents: Sequence[NDArray[np.int32]], folder: Path, settings: ScoringSettings) -> float:
    """Score the parts that ``folder`` does not hold yet.

    Returns the tokens per second of this call, or 0 if nothing was left to do. With several devices each
    process scores every ``devices``-th part. The scores do not depend on the number of devices.
    """
    from lightning.fabric import Fabric

    folder.mkdir(parents=True, exist_ok=True)
    tokens = {"token_ids": np.concatenate(documents), "lengths": np.array([len(ids) for ids in documents])}
    replace_file(folder / TOKENS_FILE, lambda path: _save(path, tokens))
    bounds = part_bounds([len(ids) for ids in documents], settings.part_tokens)
    todo = [part for part in range(len(bounds)) if not _part_file(folder, part).exists()]
    num_tokens = sum(len(ids) for part in todo for ids in documents[slice(*bounds[part])])
    if not todo:
        return 0.0
    if len(todo) < len(bounds):
        print(
            f"{len(bounds) - len(todo)} of {len(bounds)} parts were scored earlier and are kept ({folder})",
            flush=True,
        )
    started = time.monotonic()
    # Processes are spawned rather than started as new commands, because prepare may be called from Python as
    # well as from the command line.
    strategy = "auto" if settings.devices == 1 else "ddp_spawn"
    precision: Any = settings.precision
    fabric = Fabric(
        accelerator=settings.accelerator, devices=settings.devices, strategy=strategy, precision=precision
    )
    # Lightning walks through the arguments of what it launches, and it rejects frozen dataclasses.
    fabric.launch(functools.partial(_score_process, folder=folder, settings=settings, todo=todo))
    return num_tokens / max(time.monotonic() - started, 1e-9)


def scores_key(documents: Sequence[NDArray[np.int32]], settings: ScoringSettings) -> str:
    """Hash everything that the scores depend on.

    An interrupted run therefore never continues with the scores of a different one.
    """
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    special_ids = (settings.start_ids, settings.unused_ids)
    digest.update(
        repr(
            (
                settings.proxy,
                special_ids,
                settings.precision,
                settings.window,
                settings.overlap,
                settings.part_tokens,
            )
        ).encode()
    )
    digest.update(proxy_fingerprint(settings.proxy).encode())
    return digest.hexdigest()[:16]


def read_scores(folder: Path, part: int, lengths: Sequence[int]) -> list[DocumentScores]:
    """Read the scores of one part's documents, which have ``lengths`` tokens."""
    cuts = np.cumsum(lengths)[:-1]
    path = _part_file(folder, part)
    names = [field.name for field in dataclasses.fields(DocumentScores)]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: not readable scores of `rpt prepare` ({error}); "
            "remove the file, and the same command scores that part again"
        ) from error
    wrong = [name for name, values in columns.items() if len(values) != sum(lengths)]
    if wrong:
        raise ValueError(
            f"{path}: {len(columns[wrong[0]])} entries of {wrong[0]} for {sum(lengths)} tokens; "
            "remove the file, and the same command scores that part again"
        )
    fields = {name: np.split(values, cuts) for name, values in columns.items()}
    return [
        DocumentScores(**{name: rows[index] for name, rows in fields.items()})
        for index in range(len(lengths))
    ]


def _score_process(fabric: Any, folder: Path, settings: ScoringSettings, todo: list[int]) -> None:
    with np.load(folder / TOKENS_FILE, allow_pickle=False) as arrays:
        lengths: list[int] = arrays["lengths"].tolist()
        documents = np.split(arrays["token_ids"], np.cumsum(lengths)[:-1])
    bounds = part_bounds(lengths, settings.part_tokens)
    part_tokens = {part: sum(lengths[slice(*bounds[part])]) for part in todo}
    scorer = _load_scorer(fabric, settings)
    report = _progress(folder, part_tokens)
    for part in todo[fabric.global_rank :: fabric.world_size]:
        scores = scorer.score(documents[slice(*bounds[part])])
        arrays_out = {
            field.name: np.concatenate([getattr(row, field.name) for row in scores])
            for field in dataclasses.fields(DocumentScores)
        }
        replace_file(_part_file(folder, part), lambda path, arrays=arrays_out: _save(path, arrays))
        if fabric.global_rank == 0:
            report()


def _load_scorer(fabric: Any, settings: ScoringSettings) -> ProxyScorer:
    import torch

    from rpt_lightning.pretrained.weights import load_causal_lm

    dtype = torch.bfloat16 if settings.precision == "bf16-true" else torch.float32
    model: Any = load_causal_lm(settings.proxy, where=f"--proxy {settings.proxy!r}", dtype=dtype)
    fabric.to_device(model.eval())
    return ProxyScorer(
        model,
        window=settings.window,
        overlap=settings.overlap,
        batch_tokens=settings.batch_tokens,
        start_ids=settings.start_ids,
        unused_ids=settings.unused_ids,
        autocast=fabric.autocast,
    )


def _progress(folder: Path, part_tokens: dict[int, int]) -> Callable[[], None]:
    """Return a function that prints the progress of all processes together."""
    started = time.monotonic()
    total = sum(part_tokens.values())

    def report() -> None:
        done = sum(tokens for part, tokens in part_tokens.items() if _part_file(folder, part).exists())
        speed = done / max(time.monotonic() - started, 1e-9)
        left_s = round((total - done) / max(speed, 1e-9))
        print(
            f"scored {done:,} of {total:,} tokens, {speed:,.0f} tokens/s, "
            f"{left_s // 60} min {left_s % 60:02d} s left",
            flush=True,
        )

    return report


def _part_file(folder: Path, part: int) -> Path:
    return folder / f"scores-{part:06d}.npz"


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def iterate_scores(folder: Path, lengths: Sequence[int], part_tokens: int) -> Iterator[DocumentScores]:
    """Yield the scores of all documents in order, with one part in memory at a time."""
    for part, (start, stop) in enumerate(part_bounds(lengths, part_tokens)):
        yield from read_scores(folder, part, lengths[start:stop])
