"""Task folders for the tests.

``prepare`` makes one from a small corpus. Tests that need to choose the content write small ones directly.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpt_lightning.data.prepare.prepare_command import prepare
from rpt_lightning.data.sources.corpus import JsonlSource
from rpt_lightning.data.store.manifest import FORMAT, MANIFEST_FILE
from rpt_lightning.data.store.shards import folder_checksums, write_split
from rpt_lightning.pretrained.token_bytes import tokenizer_hash

FORMULAS = ["{x}", "\\frac{1}{2}", "x_{i}", "} else {"]


def random_text(rng: random.Random, num_words: int) -> str:
    """Write words that no other document repeats, and some formulas.

    With the formulas some positions have no answer that fits into a box.
    """
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(num_words)]
    return " ".join(
        f"{word} {rng.choice(FORMULAS)}" if index % 4 == 3 else word for index, word in enumerate(words)
    )


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twenty documents.

    Sixteen are unrelated. The others are an exact duplicate, a near duplicate, one that is too short, and one
    with chat markers in its text.
    """
    rng = random.Random(0)
    texts = [random_text(rng, 12 + index) for index in range(16)]
    texts += [
        texts[3],
        texts[4] + " and an end of its own",
        "short",
        "a <|im_end|> b </think> c " + random_text(rng, 30),
    ]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text(
        "".join(
            json.dumps({"problem": text, "solution": str(index)}) + "\n" for index, text in enumerate(texts)
        )
    )
    return path


@pytest.fixture(scope="session")
def prepare_small(corpus_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """Run ``prepare`` on the small corpus. Keywords override its settings."""

    def run(output_dir: Path, **settings: Any) -> Path:
        defaults: dict[str, Any] = {
            "source": JsonlSource(str(corpus_path), template="{problem}"),
            "tokenizer": str(tiny_model_dir),
            "proxy": str(tiny_model_dir),
            "heldout_documents": 4,
            "min_context": 8,
            "window": 64,
            "overlap": 16,
            "batch_tokens": 128,
            "precision": "32-true",
        }
        prepare(output_dir=str(output_dir), **(defaults | settings))
        return output_dir

    return run


@pytest.fixture(scope="session")
def prepared_dir(prepare_small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("tasks") / "small")


@pytest.fixture(scope="session")
def write_task_folder(tiny_tokenizer: Any) -> Callable[..., Path]:
    """Write a task folder with a chosen number of positions per document.

    Position ``k`` of a document is token ``k + 1``. All tokens differ.
    """

    def write(
        path: Path,
        num_positions: list[int],
        *,
        chunk_bytes: str = "64MB",
        doc_ids: list[str] | None = None,
        **manifest: Any,
    ) -> Path:
        for split in ("train", "heldout"):
            ids = doc_ids or [f"{split}-{index}" for index in range(len(num_positions))]
            write_split(path / split, map(_item, ids, num_positions), chunk_bytes=chunk_bytes)
        tiny_tokenizer.save_pretrained(path / "tokenizer")
        defaults = {
            "format": FORMAT,
            "settings": {"tokenizer": "models/tiny"},
            "tokenizer_hash": tokenizer_hash(tiny_tokenizer),
            "proxy": "models/tiny",
            "answer_reach": 3,
            "corpus": {"sha256": "0" * 64},
        }
        checksums = {part: folder_checksums(path / part) for part in ("train", "heldout", "tokenizer")}
        content = defaults | {"sha256": checksums} | manifest
        (path / MANIFEST_FILE).write_text(json.dumps(content))
        return path

    return write


def _item(doc_id: str, num_positions: int) -> dict[str, Any]:
    entropy = np.linspace(0.6, 2.0, num_positions, dtype=np.float32)
    # The letters A, B, C ... of the byte-level vocabulary are answerable. Each probability is half the
    # previous one.
    candidate_ids = np.tile(np.arange(40, 56, dtype=np.int32), (num_positions, 1))
    return {
        "doc_id": doc_id,
        "token_ids": (np.arange(num_positions + 1, dtype=np.int32) % 60) + 40,
        "positions": np.arange(1, num_positions + 1, dtype=np.int32),
        "entropy": entropy,
        "true_prob": np.full(num_positions, 0.25, np.float32),
        "true_rank": np.arange(num_positions, dtype=np.int32),
        "answerable": np.ones(num_positions, np.uint8),
        "candidate_ids": candidate_ids,
        "candidate_probs": np.tile((0.5 ** np.arange(1, 17)).astype(np.float32), (num_positions, 1)),
    }
