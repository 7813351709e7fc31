"""The contents of a task folder, for comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpt_lightning.data.store.task_folder import TaskFolder

Prepare = Callable[..., Path]


def items(folder: Path, split: str = "train") -> dict[str, Any]:
    reader = TaskFolder(folder, split)  # type: ignore[arg-type]
    return {reader.document(index)["doc_id"]: reader.document(index) for index in range(len(reader))}


def stored(folder: Path) -> dict[str, Any]:
    """Return everything that a run may not change."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["scoring_tokens_per_s"]
    chunks = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("chunk-*"))}
    return {"manifest": manifest, "chunks": chunks}
