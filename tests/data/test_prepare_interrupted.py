"""`rpt prepare` stopped in the middle: scores are kept, and nothing else is trusted."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folder_contents import Prepare, items, stored

from rpt_lightning.data.prepare import scored_parts
from rpt_lightning.data.prepare.proxy_scores import ProxyScorer

SCRIPT = """
import json, sys, time
from rpt_lightning.data.sources.corpus import JsonlSource
from rpt_lightning.data.prepare.prepare_command import prepare
from rpt_lightning.data.prepare.proxy_scores import ProxyScorer

score, parts = ProxyScorer.score, []
def score_one_part(self, documents):
    if parts:
        time.sleep(600)  # until the test ends it
    parts.append(score(self, documents))
    return parts[0]
ProxyScorer.score = score_one_part
settings = json.loads(sys.argv[1])
source = JsonlSource(settings.pop("corpus"), template="{problem}")
prepare(source, **settings)
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_it_continues(
    stop: signal.Signals,
    prepared_dir: Path,
    prepare_small: Prepare,
    corpus_path: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts with scores are not scored again, and the folder equals that of an undisturbed run.

    The undisturbed run has the same batches. With other batches, scores differ in their last bits on some
    processors.
    """
    expected = stored(prepare_small(tmp_path / "undisturbed", batch_tokens=64))
    output = tmp_path / "tasks"
    settings = {
        "corpus": str(corpus_path),
        "output_dir": str(output),
        "tokenizer": str(tiny_model_dir),
        "proxy": str(tiny_model_dir),
    } | {
        "heldout_documents": 4,
        "min_context": 8,
        "window": 64,
        "overlap": 16,
        "batch_tokens": 64,
        "precision": "32-true",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    try:
        while not list(tmp_path.glob("tasks.partial/*/scores-*.npz")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(stop)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert not output.exists()
    if stop == signal.SIGINT:
        assert "The scores so far are kept" in said
    assert len(list(tmp_path.glob("tasks.partial/*/scores-*.npz"))) == 1
    scored: list[int] = []
    original = ProxyScorer.score
    monkeypatch.setattr(
        ProxyScorer,
        "score",
        lambda self, documents: scored.append(len(documents)) or original(self, documents),
    )
    prepare_small(output, batch_tokens=64)
    assert 0 < sum(scored) < 18
    assert stored(output) == expected
    for split in ("train", "heldout"):  # the batches are smaller, so scores are equal up to rounding
        for doc_id, item in items(output, split).items():
            np.testing.assert_allclose(
                item["entropy"], items(prepared_dir, split)[doc_id]["entropy"], atol=1e-5
            )
    assert not output.with_name("tasks.partial").exists()


def test_scores_of_other_settings_are_not_continued_with(
    prepare_small: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails after scoring leaves its scores. A run with another window must not use them."""
    scored: list[int] = []
    original = ProxyScorer.score
    monkeypatch.setattr(
        ProxyScorer,
        "score",
        lambda self, documents: scored.append(len(documents)) or original(self, documents),
    )
    with pytest.raises(ValueError, match=r"--entropy_threshold 5\.0: no position of the train documents"):
        prepare_small(tmp_path / "a", entropy_threshold=5.0)
    assert sum(scored) == 18
    prepare_small(tmp_path / "a", window=32)
    assert sum(scored) == 36


def test_other_thresholds_do_use_the_scores_again(
    prepare_small: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"--heldout_entropy_threshold 5\.0"):
        prepare_small(tmp_path / "a", heldout_entropy_threshold=5.0)
    monkeypatch.setattr(ProxyScorer, "score", None)
    assert items(prepare_small(tmp_path / "a"))


def test_a_full_disk_leaves_nothing_that_is_trusted(
    prepare_small: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpt_lightning.data.prepare.settings.BATCHES_PER_PART", 2)
    expected = stored(prepare_small(tmp_path / "undisturbed"))
    calls: list[Path] = []
    original = scored_parts._save

    def save(path: Path, arrays: dict[str, Any]) -> None:
        calls.append(path)
        if len(calls) == 3:  # after the tokens and one part, the disk is full in the middle of a file
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, arrays)

    monkeypatch.setattr(scored_parts, "_save", save)
    with pytest.raises(
        OSError, match=r"No space left on device: --output_dir .*tasks is not finished. Free some space"
    ):
        prepare_small(tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()
    assert all(np.load(path) for path in tmp_path.glob("tasks.partial/*/*"))
    monkeypatch.setattr(scored_parts, "_save", original)
    assert stored(prepare_small(tmp_path / "tasks")) == expected
