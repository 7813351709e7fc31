"""The manifest of a task folder: what it was made with, what it holds, and the checksums of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from rpt_lightning.objectives.next_token import PLACES as NEXT_TOKEN

MANIFEST_FILE = "manifest.json"
# 2: a document's id is stored as bytes (item_format.py). Folders of format 1, with text ids, are still read.
FORMAT = 2
READABLE_FORMATS = (1, 2)
# The entries without which a folder cannot be used.
_ENTRIES: dict[str, type] = {
    **{
        "settings": dict,
        "settings.tokenizer": str,
        "tokenizer_hash": str,
        "proxy": str,
        "answer_reach": int,
        "corpus": dict,
        "corpus.sha256": str,
    },
    **{"sha256": dict, "sha256.train": dict, "sha256.heldout": dict, "sha256.tokenizer": dict},
}
_WORDS = {dict: "an object", str: "text", int: "a whole number"}
# Settings of `rpt prepare` that are newer than some folders, with the values used for those folders.
LATER_SETTINGS: dict[str, Any] = {
    "dedup_span": 13,
    "objective": NEXT_TOKEN,
    "max_true_rank": None,
    "random_share": None,
}
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class CorpusCounts:
    """What the source held, and how many of its documents were left out for which reason.

    ``sha256`` is the fingerprint of all its documents. A count is None if there was nothing to count it in:
    no benchmark files, or no marks. A count that an older folder does not have is 0.
    """

    sha256: str
    documents_read: int = 0
    too_short: int = 0
    inexpressible: int = 0
    exact_duplicates: int = 0
    inexpressible_benchmark_texts: int | None = None
    overlap_with_benchmark_files: int | None = None
    components: int = 0
    largest_component: int = 0
    siblings_of_heldout_documents: int = 0
    not_sampled: int = 0
    marks: int | None = None
    marks_in_which_no_token_begins: int | None = None
    marks_behind_the_cut: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What one split holds.

    ``fields`` counts the positions that have each field, ``without_material`` those for which the objective
    found nothing to ask about, and ``last_position`` is the largest position of any document. An older folder
    does not have all counts. They are 0 then, and ``last_position`` is None.
    """

    fields: Mapping[str, int] = field(default_factory=dict)
    documents: int = 0
    tokens: int = 0
    scored_positions: int = 0
    positions: int = 0
    unanswerable: int = 0
    without_material: int = 0
    last_position: int | None = None
    entropy_histogram: Mapping[str, Any] = field(default_factory=dict)  # for people; no code reads it
    bands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # likewise

    def to_json(self) -> dict[str, Any]:
        counted_if_any = ("fields", "without_material")
        return {name: value for name, value in asdict(self).items() if name not in counted_if_any or value}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a task folder.

    ``settings`` are those of ``rpt prepare``, in JSON types and under their flags' names. ``proxy`` is the
    model that scored the positions. ``answer_reach`` is the longest right answer in tokens. ``sha256`` has
    the checksum of every file of ``train``, ``heldout`` and ``tokenizer`` by its name.
    """

    settings: Mapping[str, Any]
    tokenizer_hash: str
    proxy: str
    proxy_fingerprint: str | None = None  # None: the folder is from before it was stored
    answer_reach: int
    corpus: CorpusCounts
    shared_spans_between_splits: int = 0
    splits: Mapping[str, SplitSummary] = field(default_factory=dict)
    sha256: Mapping[str, Mapping[str, str]]
    scoring_tokens_per_s: float = 0.0

    @property
    def all_settings(self) -> dict[str, Any]:
        """The settings, including those that did not exist yet when the folder was made."""
        return LATER_SETTINGS | dict(self.settings)

    @property
    def tokenizer(self) -> str:
        """Model folder or hub id that the tokenizer was taken from."""
        return str(self.settings["tokenizer"])

    @property
    def places(self) -> str:
        """What the folder's tasks ask about (``Objective.places``)."""
        return str(self.all_settings["objective"])

    def last_position(self, split: str) -> int | None:
        """Return the largest position of any document of a split, or None if it was not stored."""
        return self.splits[split].last_position if split in self.splits else None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "tokenizer_hash": self.tokenizer_hash,
            "proxy": self.proxy,
            "proxy_fingerprint": self.proxy_fingerprint,
            "answer_reach": self.answer_reach,
            "corpus": self.corpus.to_json(),
            "shared_spans_between_splits": self.shared_spans_between_splits,
            "splits": {split: summary.to_json() for split, summary in self.splits.items()},
            "sha256": {part: dict(files) for part, files in self.sha256.items()},
            "scoring_tokens_per_s": self.scoring_tokens_per_s,
        }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest. Its presence makes a folder a task folder, so it is written last."""
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest.to_json(), indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a task folder. Raises ValueError if it is missing or damaged."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder}: not a task folder ({MANIFEST_FILE} is missing); "
            "name a folder that `rpt prepare` finished"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, name: str) -> Manifest:
    """Parse a manifest. Raises ValueError, with its ``name``, if it is damaged or of another version."""
    try:
        stored: dict[str, Any] = json.loads(content)
        if stored["format"] not in READABLE_FORMATS:
            raise ValueError(f"format {stored['format']}, not one of {READABLE_FORMATS}")
        _check_entries(stored)
        records = {
            "corpus": _record(CorpusCounts, stored["corpus"]),
            "splits": {
                split: _record(SplitSummary, summary) for split, summary in stored.get("splits", {}).items()
            },
        }
        return _record(Manifest, stored | records)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{name}: not a manifest that this version reads ({found}); "
            "make the task folder again with `rpt prepare`"
        ) from error


def _record(kind: type[R], stored: Mapping[str, Any]) -> R:
    """Build a record from the entries that it knows."""
    known: Any = kind
    return kind(**{entry.name: stored[entry.name] for entry in fields(known) if entry.name in stored})


def _check_entries(stored: dict[str, Any]) -> None:
    """Raise ValueError if an entry is missing or has a wrong type, as in a file that was edited by hand."""
    for path, kind in _ENTRIES.items():
        value: Any = stored
        for name in path.split("."):
            if name not in value:
                why = "; without checksums damage would go unnoticed" if path.startswith("sha256") else ""
                raise ValueError(f"{path}: there is no such entry{why}")
            value = value[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{path} is {value!r}, but must be {_WORDS[kind]}")
    for part, files in stored["sha256"].items():
        for name, checksum in files.items():
            if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
                raise ValueError(f"sha256.{part}.{name} is {checksum!r}, but must be a SHA-256")
    if stored["answer_reach"] < 1:
        raise ValueError(f"answer_reach is {stored['answer_reach']}, but must be a number of tokens")
    for split, summary in stored.get("splits", {}).items():
        if not isinstance(summary, dict):
            raise ValueError(f"splits.{split} is {summary!r}, but must be an object")
        last = summary.get("last_position", 0)
        if not isinstance(last, int) or isinstance(last, bool) or last < 0:
            raise ValueError(f"splits.{split}.last_position is {last!r}, but must be a position")
