"""Damaged scores that an interrupted `rpt prepare` left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rpt_lightning.data.prepare.proxy_scores import DocumentScores
from rpt_lightning.data.prepare.scored_parts import read_scores

NAMES = [field.name for field in dataclasses.fields(DocumentScores)]


def test_parts_of_another_length_or_damaged_are_named(tmp_path: Path) -> None:
    path = tmp_path / "scores-000000.npz"
    columns = {name: np.arange(5, dtype=np.float32) for name in NAMES}
    np.savez(path, **columns)
    assert read_scores(tmp_path, 0, [2, 3])[1].entropy.tolist() == [2.0, 3.0, 4.0]
    for name in NAMES:
        np.savez(path, **(columns | {name: np.zeros(4, np.float32)}))
        with pytest.raises(
            ValueError, match=rf"scores-000000\.npz: 4 entries of {name} for 5 tokens; remove the file"
        ):
            read_scores(tmp_path, 0, [2, 3])
    np.savez(path, **{name: columns[name] for name in NAMES[1:]})
    with pytest.raises(ValueError, match=r"scores-000000\.npz: not readable scores .*; remove the file"):
        read_scores(tmp_path, 0, [2, 3])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"scores-000000\.npz: not readable scores .*; remove the file"):
        read_scores(tmp_path, 0, [2, 3])
