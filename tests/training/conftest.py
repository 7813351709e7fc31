"""A whole run in a few lines, for tests of any part of it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SCRIPT, quiet_trainer

from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import DynamicSampling, Sampling
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.callback import RunCheckpoint
from rpt_lightning.training.modules.rpt_module import RPTModule


@pytest.fixture
def make_run(tiny_model_dir: Path, tiny_task_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """``make_run(max_steps, ...)`` -> (trainer, module, data) of a small RPT run with a scripted engine."""

    def make(
        max_steps: int,
        *,
        engine: Callable[[], RolloutEngine] = lambda: ScriptedEngine(SCRIPT),
        run_dir: Path | None = None,
        policy_options: dict[str, Any] | None = None,
        module_options: dict[str, Any] | None = None,
        rollout_options: dict[str, Any] | None = None,
        data_options: dict[str, Any] | None = None,
        callbacks: list[Any] | None = None,
        **trainer_options: Any,
    ) -> Any:
        module = RPTModule(
            Policy(**({"path": str(tiny_model_dir)} | (policy_options or {}))),
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
            **(module_options or {}),
        )
        rollout = RolloutCallback(
            engine(),
            NextTokenObjective(ContinuationPrompt(), PrefixMatchReward()),
            **(
                {
                    "group_size": 4,
                    "max_prompt_tokens": 96,
                    "sampling": Sampling(max_completion_tokens=32),
                    "dynamic_sampling": DynamicSampling(from_step=None),
                }
                | (rollout_options or {})
            ),
        )
        data = TokenTaskDataModule(
            str(tiny_task_dir), **({"tasks_per_step": 8, "positions_per_document": 2} | (data_options or {}))
        )
        trainer = quiet_trainer(
            run_dir or tmp_path / "run",
            max_steps,
            [rollout, RunCheckpoint(every_n_steps=1), *(callbacks or [])],
            **trainer_options,
        )
        return trainer, module, data

    return make


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system of ``@pytest.mark.parametrize("small_disk", [MEBIBYTES], indirect=True)``."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system is not permitted here, so there is no small disk to fill")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
