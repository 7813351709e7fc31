"""Every YAML in configs/ is parsed and built with the classes that it names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from commented_options import uncommented
from rpt_lightning.rollout.servers.server_engine import VLLMServerEngine
from rpt_lightning.rollout.settings import Selection
from rpt_lightning.rollout.weight_sync.transport import SharedFolderTransport
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "demo").glob("*.yaml")])
STRATEGIES = sorted((CONFIGS / "strategy").glob("*.yaml"))
ROLLOUTS = sorted((CONFIGS / "rollout").glob("*.yaml"))
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
OBJECTIVES = sorted((CONFIGS / "objective").glob("*.yaml"))
DATA = sorted((CONFIGS / "data").glob("*.yaml"))
SERVERS = CONFIGS / "rollout" / "servers.yaml"
PREPARE = sorted((CONFIGS / "prepare").glob("*.yaml"))


def instantiate(monkeypatch, *configs, flags=()):
    from rpt_lightning.cli.run import make_cli

    args = ["fit", *(part for config in configs for part in ("--config", str(config))), *flags]
    monkeypatch.setattr(sys, "argv", ["rpt", *args])
    return make_cli(run=False, args=args[1:])


def below(config: Path) -> list[Path]:
    """Return what this config is added to besides a run: a judge needs the objective it judges for."""
    return [CONFIGS / "objective" / "next-segment.yaml"] if config.stem.startswith("judge") else []


@pytest.mark.parametrize("config", RUNS, ids=lambda path: path.stem)
def test_run_config(config, offline_policy, monkeypatch, tmp_path):
    cli = instantiate(
        monkeypatch,
        config,
        flags=["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)],
    )
    assert cli.trainer.max_steps == yaml.safe_load(config.read_text())["trainer"]["max_steps"]
    optimizer = cli.model.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (
        optimizer.param_groups[0]["lr"]
        == yaml.safe_load(config.read_text())["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda path: path.stem)
def test_strategy_over_the_paper_run(strategy, offline_policy, monkeypatch, tmp_path):
    flags = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "1",
        "--trainer.default_root_dir",
        str(tmp_path),
        "--model.optimizer.lr",
        "2e-6",
    ]
    cli = instantiate(monkeypatch, CONFIGS / "14b.yaml", strategy, flags=flags)
    expected = {"ddp": "DDPStrategy", "single": "SingleDeviceStrategy"}
    assert type(cli.trainer.strategy).__name__ == expected.get(strategy.stem, "ShardedStrategy")
    assert cli.config.model.init_args.optimizer.init_args.lr == 2e-6


@pytest.mark.parametrize("run", ["debug", "14b"])
def test_rollouts_elsewhere_over_a_run(run, offline_policy, monkeypatch, tmp_path):
    flags = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    cli = instantiate(
        monkeypatch, CONFIGS / f"{run}.yaml", SERVERS, CONFIGS / "rollout" / "asynchronous.yaml", flags=flags
    )
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback)]
    assert (callback.max_staleness, callback.group_size) == (
        1,
        yaml.safe_load((CONFIGS / f"{run}.yaml").read_text())["rollout"]["group_size"],
    )
    assert (cli.model.correction, cli.model.micro_batch_tokens) == (
        "truncate",
        yaml.safe_load((CONFIGS / f"{run}.yaml").read_text())["model"]["init_args"]["micro_batch_tokens"],
    )
    engine = callback.engine
    assert isinstance(engine, VLLMServerEngine)
    assert engine.urls == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    assert isinstance(engine.transport, SharedFolderTransport)


@pytest.mark.parametrize("run", ["debug", "14b"])
def test_the_trunk_over_a_run(run, offline_policy, monkeypatch, tmp_path):
    flags = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    config = CONFIGS / f"{run}.yaml"
    cli = instantiate(monkeypatch, config, CONFIGS / "model" / "trunk.yaml", flags=flags)
    own = yaml.safe_load(config.read_text())["model"]["init_args"]
    assert (cli.model.ntp_weight, cli.model.micro_batch_tokens) == (0.3, own["micro_batch_tokens"])


@pytest.mark.parametrize("run", ["debug", "14b"])
@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda path: path.stem)
def test_an_objective_over_a_run(run, config, offline_policy, monkeypatch, tmp_path):
    flags = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    cli = instantiate(monkeypatch, CONFIGS / f"{run}.yaml", *below(config), config, flags=flags)
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback)]
    overlay = yaml.safe_load(config.read_text())
    wanted = overlay["rollout"]["objective"]
    assert type(callback.objective).__name__ == wanted["class_path"]
    if "reward" in wanted["init_args"]:
        assert type(callback.objective.reward).__name__ == wanted["init_args"]["reward"]["class_path"]
    assert type(callback.objective.prompt).__name__ == "QuestionPrompt"
    if "data" in overlay:
        assert cli.datamodule.eval_min_entropy == 0.0


def test_an_objective_without_a_reward_does_not_keep_that_of_the_config(
    offline_policy, monkeypatch, tmp_path
):
    flags = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    flags += ["--rollout.objective", "NextSegmentObjective"]
    cli = instantiate(monkeypatch, CONFIGS / "debug.yaml", flags=flags)
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback)]
    assert type(callback.objective.reward).__name__ == "PrefixShareReward"


def test_selection_over_a_run(offline_policy, monkeypatch, tmp_path):
    flags = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    config = CONFIGS / "demo-text.yaml"
    more = ["--rollout.selection.by_kind", "true", "--rollout.selection.kind_floor", "0.2"]
    cli = instantiate(monkeypatch, config, CONFIGS / "rollout" / "selection.yaml", flags=[*flags, *more])
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback)]
    assert callback.selection == Selection(
        min_true_prob=0.05, max_true_prob=0.8, by_kind=True, kind_floor=0.2
    )
    assert (callback.group_size, callback.kinds.floor) == (8, 0.2)
    # Without the overlay nothing is selected.
    cli = instantiate(monkeypatch, config, flags=flags)
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback)]
    assert (callback.selection.is_on, callback.kinds) == (False, None)


@pytest.mark.parametrize("data", DATA, ids=lambda path: path.stem)
def test_data_elsewhere_over_the_paper_run(data, offline_policy, monkeypatch, tmp_path):
    flags = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.default_root_dir",
        str(tmp_path),
        "--data.task_dir",
        "s3://bucket/omnimath",
    ]
    cli = instantiate(monkeypatch, CONFIGS / "14b.yaml", data, flags=flags)
    assert (cli.datamodule.task_dir, cli.datamodule.items_per_step) == ("s3://bucket/omnimath", 256)


@pytest.mark.parametrize(
    "config",
    [
        path
        for path in [*RUNS, *ROLLOUTS, *MODELS, *OBJECTIVES]
        if uncommented(path.read_text()) != path.read_text()
    ],
    ids=lambda path: path.stem,
)
def test_commented_out_options_can_be_used(config, offline_policy, monkeypatch, tmp_path):
    file = tmp_path / config.name
    file.write_text(uncommented(config.read_text()))
    flags = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "run")]
    run = [CONFIGS / "14b.yaml"] if config in [*ROLLOUTS, *MODELS, *OBJECTIVES] else []
    run += below(config)
    instantiate(monkeypatch, *run, file, flags=flags)


def test_paper_run_is_the_papers_table_5():
    config = yaml.safe_load((CONFIGS / "14b.yaml").read_text())
    rollout, data, model = config["rollout"], config["data"]["init_args"], config["model"]["init_args"]
    assert (data["tasks_per_step"], rollout["group_size"]) == (256, 8)
    assert rollout["sampling"] == {"temperature": 0.8, "max_completion_tokens": 8192}
    optimizer = {"lr": 1e-6, "betas": [0.9, 0.999], "weight_decay": 0.01}
    assert model["optimizer"]["init_args"] == optimizer | {"fused": True}
    assert (rollout["max_prompt_tokens"], model["gradient_clip"]) == (4096, 0.2)
    assert (config["trainer"]["max_steps"], rollout["dynamic_sampling"]["from_step"]) == (1000, 500)


@pytest.mark.parametrize("commented", [False, True], ids=["as it is", "with commented-out options"])
@pytest.mark.parametrize("config", PREPARE, ids=lambda path: path.stem)
def test_prepare_config(config, commented):
    from jsonargparse import ArgumentParser

    from rpt_lightning.data.prepare.prepare_command import prepare
    from rpt_lightning.data.sources.corpus import CorpusSource

    parser = ArgumentParser()
    parser.add_function_arguments(prepare, as_group=False)
    text = config.read_text()
    parsed = parser.instantiate_classes(parser.parse_string(uncommented(text) if commented else text))
    assert isinstance(parsed.source, CorpusSource)


@pytest.mark.parametrize(
    "config", [*RUNS, *STRATEGIES, *ROLLOUTS, *OBJECTIVES, *DATA, *PREPARE], ids=lambda path: path.stem
)
def test_header_says_command_hardware_time_and_result(config):
    header = " ".join(line for line in config.read_text().splitlines() if line.startswith("#"))
    assert "rpt " in header or "make " in header
    assert "Hardware:" in header
    assert "ime:" in header or "ime and result:" in header
    assert "Expected" in header or "esult:" in header


def test_the_baseline_has_the_learning_rate_of_the_run_that_it_is_set_against():
    """As docs/decisions.md says, "Seeds of the reproduction"."""
    rates = [
        yaml.safe_load((CONFIGS / name).read_text())["model"]["init_args"]["optimizer"]["init_args"]
        for name in ("demo-text.yaml", "ntp-baseline.yaml")
    ]
    assert rates[0] == rates[1]
