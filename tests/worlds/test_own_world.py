"""A world of your own is one file. The one in docs/evidence.md goes through every command of that page.

The runs are short.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from rpt_lightning.cli import main

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
make_model = importlib.import_module("make_model")
PAGE = ROOT / "docs" / "evidence.md"
CONFIGS = ROOT / "configs"


@pytest.fixture
def countdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "countdown.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "countdown", raising=False)


def rpt(command: str) -> None:
    assert main(command.split()) == 0


def test_the_pages_world_goes_through_every_command(countdown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rpt"])
    make_model.make("world", Path("models/countdown"), world="countdown.Countdown", seed=0)
    short = (
        "--data.documents_per_step 8 --trainer.max_steps 2 "
        "--checkpoint.every_n_steps 2 --checkpoint.keep_every_n_steps null"
    )
    start = (
        f"fit --config {CONFIGS}/demo/start.yaml "
        "--data.source countdown.Countdown --model.policy.path models/countdown"
    )
    rpt(f"{start} --trainer.default_root_dir runs/start {short}")
    rpt("export --ckpt runs/start/checkpoints/step-000002.ckpt --output runs/start/export")
    small = (
        "--source.num_documents 60 --heldout_documents 10 --entropy_threshold 0.1 "
        "--heldout_entropy_threshold 0.1 --min_context 6"
    )
    prepare = (
        f"prepare --config {CONFIGS}/prepare/demo.yaml --source countdown.Countdown "
        "--tokenizer runs/start/export --proxy runs/start/export"
    )
    rpt(f"{prepare} --output_dir tasks/countdown {small}")
    engine = (
        "--rollout.engine HFEngine --rollout.engine.dtype float32 --rollout.group_size 2 "
        "--rollout.sampling.max_completion_tokens 4 --rollout.evaluation.thought_controls false"
    )
    few = (
        "--data.tasks_per_step 4 --data.num_eval_tasks 1000 --data.eval_min_entropy 0.1 "
        "--trainer.max_steps 1 --trainer.val_check_interval 1"
    )
    run = (
        f"fit --config {CONFIGS}/demo/rpt.yaml --data.task_dir tasks/countdown "
        f"--model.policy.path runs/start/export {engine} {few}"
    )
    rpt(f"{run} --trainer.default_root_dir runs/rpt --checkpoint.every_n_steps 1")
    records = [
        json.loads(line) for line in Path("runs/rpt/validation/step-000001.jsonl").read_text().splitlines()
    ]
    world = importlib.import_module("countdown").Countdown(num_documents=60, seed=2)
    documents = {document.doc_id: document for document in world.documents()}
    answers = [record for record in records if record["fields"]]
    # A random model is uncertain everywhere. Each held-out document's answer is therefore among the
    # positions, with the depth that the world gave it.
    assert {record["doc_id"] for record in answers} == {record["doc_id"] for record in records}
    assert len({record["doc_id"] for record in records}) == 10
    for record in answers:
        (mark,) = documents[record["doc_id"]].marks
        assert record["fields"] == {"depth": mark.fields["depth"]}


def test_the_same_seed_gives_the_same_start_model(countdown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the making of the random weights to the last step, bit for bit; another seed gives other ones."""
    monkeypatch.setattr(sys, "argv", ["rpt"])
    weights = []
    for run, seed in (("one", 3), ("again", 3), ("other", 4)):
        make_model.make("world", Path(f"models/{run}"), world="countdown.Countdown", seed=seed)
        short = (
            "--data.documents_per_step 8 --trainer.max_steps 3 "
            "--checkpoint.every_n_steps 3 --checkpoint.keep_every_n_steps null"
        )
        start = (
            f"fit --config {CONFIGS}/demo/start.yaml --data.source countdown.Countdown "
            f"--seed_everything {seed}"
        )
        rpt(
            f"{start} --data.seed {seed} --model.policy.path models/{run} "
            f"--trainer.default_root_dir runs/{run} {short}"
        )
        weights.append(
            torch.load(f"runs/{run}/checkpoints/step-000003.ckpt", weights_only=False)["state_dict"]
        )
    one, again, other = weights
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in one.items() if tensor.ndim > 1)


@pytest.mark.parametrize("name", ["Cups", "People", "Boxes"])
def test_worlds_go_by_their_short_names(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        f"prepare --source {name} --source.max_depth 5 --output_dir x --tokenizer x --proxy x --print_config"
    )
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 0
    assert f"class_path: rpt_lightning.worlds.{name}" in capsys.readouterr().out
