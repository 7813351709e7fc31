"""``~`` in the paths of configurations and of ``--flag=~/x``, which no shell replaces."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from rpt_lightning.cli.plan import PlanCLI
from rpt_lightning.cli.run import make_cli


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_tools(rpt, home: Path, tiny_model_dir: Path) -> None:
    (home / "text").mkdir()
    draw = random.Random(0)
    rows = [{"text": " ".join(str(draw.randrange(1000)) for _ in range(12))} for _ in range(8)]
    (home / "text" / "a.jsonl").write_text(
        "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    shutil.copytree(tiny_model_dir, home / "model")
    config = {
        "source": {
            "class_path": "rpt_lightning.data.sources.corpus.JsonlSource",
            "init_args": {"path": "~/text", "template": "{text}"},
        },
        "tokenizer": "~/model",
        "proxy": "~/model",
        "output_dir": "~/tasks",
        "precision": "32-true",
        "entropy_threshold": 0.0,
        "heldout_entropy_threshold": 0.0,
        "min_context": 2,
        "window": 256,
        "overlap": 64,
        "heldout_documents": 2,
        "benchmark_files": ["~/bench.txt"],
    }
    (home / "bench.txt").write_text("nothing of the text")
    (home / "prepare.yaml").write_text(json.dumps(config))
    status, output = rpt("prepare", "--config=~/prepare.yaml")
    assert status == 0, output
    assert (home / "tasks" / "manifest.json").is_file()


def test_the_configuration_of_a_run(home: Path, flags) -> None:
    args = [*map(str, flags), "--trainer.default_root_dir=~/runs/a", "--data.task_dir=~/tasks"]
    config = make_cli(PlanCLI, run=False, args=args, prog="rpt plan").config
    assert config.trainer.default_root_dir == str(home / "runs" / "a")
    assert config.data.init_args.task_dir == str(home / "tasks")
