"""The public Python API, and the lines of the README that show it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rpt_lightning

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_public_name_is_there() -> None:
    assert sorted(rpt_lightning.__all__) == sorted(rpt_lightning._MODULES)
    assert all(hasattr(rpt_lightning, name) for name in rpt_lightning.__all__)
    assert set(rpt_lightning.__all__) <= set(dir(rpt_lightning))
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        rpt_lightning.Polcy  # noqa: B018


def test_the_readmes_lines_train_and_evaluate(
    tiny_model_dir: Path, tiny_task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's lines run with one step instead of twenty.

    A tiny model and its tasks stand at the paths that the lines name. The engine is transformers'.
    """
    (lines,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in lines.splitlines() if line.strip()]) <= 13
    for path, there in (("runs/demo/start/export", tiny_model_dir), ("tasks/demo", tiny_task_dir)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).symlink_to(there)
    monkeypatch.chdir(tmp_path)
    short = lines.replace("VLLMEngine", "HFEngine").replace("max_steps=20", "max_steps=1")
    short = short.replace("tasks_per_step=32", "tasks_per_step=4, num_eval_tasks=6")
    short = short.replace("group_size=8", "group_size=2").replace(
        "max_completion_tokens=64", "max_completion_tokens=8"
    )
    assert short.count("HFEngine") == 1
    ran: dict[str, object] = {}
    exec(compile(short, "README.md", "exec"), ran)
    trainer: object = ran["trainer"]
    assert trainer.global_step == 1  # type: ignore[attr-defined]
    metrics = ran["metrics"]
    assert {"val/ntp/easy/accuracy", "val/reasoning/easy/accuracy"} <= set(metrics[0])  # type: ignore[index]
