"""`rpt plan` as a user meets it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from rpt_lightning import cli
from rpt_lightning.plan_cli import optimizer_bytes_per_param, plan_text

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QWEN2_14B = str(Path(__file__).with_name("qwen2-14b.json"))
PAPER_RUN = ["--config", str(CONFIGS / "14b.yaml"), "--plan.model_config", QWEN2_14B]
FSDP2 = ["--config", str(CONFIGS / "strategy" / "fsdp2.yaml"), "--trainer.devices", "8"]


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["rpt"])


def row(text: str, label: str) -> list[str]:
    """The cells behind a label."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def number(text: str, label: str) -> float:
    """The first cell behind a label."""
    return float(row(text, label)[0].replace(",", ""))


def test_the_papers_run_on_eight_h100s():
    text = plan_text([*PAPER_RUN, *FSDP2])
    assert "256 contexts (1 from each of 256 documents) x 8 = 2,048 completions" in text
    assert "14,770,033,664 parameters" in text
    assert row(text, "weights, fp32") == ["59.08", "59.08", "7.39"]
    assert row(text, "optimizer  ") == ["118.16", "118.16", "14.77"]
    assert row(text, "engine: weights") == ["29.54"] * 3
    assert row(text, "does it fit?") == ["NO", "NO", "NO"]
    assert "The first bottleneck is memory" in text
    assert "autocast's copy of the weights (26 GB)" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


# What the paper's run fits on: sharded over many of the largest devices.
LARGE = ["--plan.device", "h200", "--rollout.engine.gpu_memory_utilization", "0.35"]


def test_more_and_larger_devices_fit():
    text = plan_text([*PAPER_RUN, *FSDP2, *LARGE, "--plan.num_devices", "64"])
    assert "(H200 SXM: 141)" in text
    assert row(text, "weights, fp32") == ["59.08", "59.08", "0.92"]
    assert row(text, "does it fit?") == ["NO", "NO", "yes"]
    assert "on 64 ranks (4 contexts each)" in " ".join(text.split())
    assert re.search(r"The first bottleneck is (generation|training): \d+% of the step", text)


def test_idle_ranks_are_said():
    text = plan_text([*PAPER_RUN, *FSDP2, *LARGE, "--plan.num_devices", "1024"])
    assert "768 of 1,024 ranks have nothing to train" in " ".join(text.split())


def test_flags_and_files_are_those_of_fit():
    """Overrides reach the plan, and so does what the files leave to the classes' defaults."""
    text = plan_text(
        [*PAPER_RUN, *FSDP2, "--rollout.group_size", "4", "--model.optimizer", "torch.optim.SGD", "--model.policy.activation_checkpointing", "false"]
    )
    assert "x 4 = 1,024 completions" in text
    assert row(text, "optimizer  ") == ["-", "-", "-"]
    assert number(text, "activations, all layers kept") > number(plan_text([*PAPER_RUN, *FSDP2]), "activations, layers recomputed")


def test_optimizer_state_is_that_of_the_real_class():
    from jsonargparse import Namespace

    def state(class_path, **options):
        return optimizer_bytes_per_param(Namespace(class_path=class_path, init_args=Namespace(lr=0.1, **options)))

    assert state("torch.optim.AdamW") == 8
    assert state("torch.optim.AdamW", amsgrad=True) == 12
    assert state("torch.optim.SGD") == 0
    assert state("torch.optim.SGD", momentum=0.9) == 4


def test_prompts_of_the_task_folder(tiny_model_dir, tiny_task_dir):
    """Counted on the very batch that a run would begin with."""
    from rpt_lightning.data.datamodule import TokenTaskDataModule
    from rpt_lightning.tasks.prompt import ContinuationPrompt

    flags = ["--model.policy.path", str(tiny_model_dir), "--data.task_dir", str(tiny_task_dir), "--data.tasks_per_step", "8"]
    text = plan_text(["--config", str(CONFIGS / "debug.yaml"), *flags])
    data = TokenTaskDataModule(str(tiny_task_dir), tasks_per_step=8, positions_per_document=4)
    data.setup("fit")
    prompt = ContinuationPrompt().bind(data.train.tokenizer)
    lengths = [len(prompt.prompt_ids(task.context_ids)) for task in next(iter(data.train_dataloader()))["tasks"]]
    assert f"those of the run's first step, from {tiny_task_dir}" in " ".join(text.split())
    assert number(text, "trained, each completion alone") == sum(4 * (length + 8) for length in lengths)  # half of 16 tokens each
    assert number(text, "trained, prefixes shared") < number(text, "trained, each completion alone") - 3 * sum(lengths)
    assert "this CPU, measured" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--plan.device", "b9000"], "--plan.device b9000: choose from h100"),
        (["--plan.completion_tokens", "0"], "--plan.completion_tokens 0"),
        (["--plan.mfu", "40"], "--plan.mfu 40"),
        (["--plan.context_tokens", "9000"], "contexts are cut to 3840"),
        (["--plan.model_config", "no/such/config.json"], "no/such/config.json"),
        (["--trainer.strategy", "deepspeed"], "deepspeed"),
        (["--trainer.strategy.init_args.tensor_parallel_size", "2"], "tensor_parallel_size=2"),
        (["--rollout.engine", "null"], "rollout.engine is not set"),
        (["--model", "NTPModule"], "RPTModule"),
    ],
)
def test_bad_input_is_one_clear_error(flags, expected, capfd):
    try:
        status = cli.main(["plan", *PAPER_RUN, *FSDP2, *flags])
    except SystemExit as end:
        status = end.code
    shown = capfd.readouterr().err
    assert status != 0
    assert expected in shown
    assert "Traceback" not in shown


def test_a_hub_id_without_network_names_the_way_out(monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["plan", "--config", str(CONFIGS / "14b.yaml")]) == 1
    shown = capfd.readouterr().err
    assert "DeepSeek-R1-Distill-Qwen-14B" in shown
    assert "--plan.model_config" in shown
    assert len(shown.strip().splitlines()) == 1


def test_nothing_is_built(monkeypatch, tiny_model_dir, tmp_path, capfd):
    """Neither weights nor a trainer, nor a run folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "config.json")  # no weights and no tokenizer beside it
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args: pytest.fail("a module was moved"))
    assert cli.main(["plan", "--config", str(CONFIGS / "debug.yaml"), "--plan.model_config", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "there is no task folder tasks/debug" in " ".join(capfd.readouterr().out.split())
