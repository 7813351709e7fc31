"""Class paths of earlier versions in configurations. They are accepted for one release, with a message."""

from __future__ import annotations

import warnings
from typing import Any

import jsonargparse
import yaml

# Where classes of these modules are now, without the package's own name before both.
_MODULES = {
    "tasks.prompt": "objectives.prompts.template",
    "tasks.reward": "objectives.rewards.next_token",
    "tasks.answer_reward": "objectives.rewards.answer",
    "data.corpus": "data.sources.corpus",
    "data.questions": "data.sources.questions",
    "data.datamodule": "data.modules.token_tasks",
    "data.answer_datamodule": "data.modules.answers",
    "data.corpus_datamodule": "data.modules.corpus",
    "data.text_datamodule": "data.modules.text",
    "data.trace_datamodule": "data.modules.traces",
    "data.mixed_datamodule": "data.modules.mixed",
    "data.worked_examples": "data.modules.worked_examples",
    "rollout.hf_engine": "rollout.engines.hf_engine",
    "rollout.scripted_engine": "rollout.engines.scripted_engine",
    "rollout.vllm_engine": "rollout.engines.vllm.engine",
    "rollout.vllm_server_engine": "rollout.servers.engine",
    "rollout.weight_transport": "rollout.sync.transport",
    "rollout.vllm_nccl_transport": "rollout.sync.nccl_transport",
    "training.module": "training.modules.rpt_module",
    "training.ntp_module": "training.modules.ntp_module",
    "training.strategy": "training.distributed.strategy",
}
_OBJECTIVES = ("rpt_lightning.tasks.objective.Objective", "rpt_lightning.Objective", "Objective")


def accept_former_names() -> None:
    """Make every parser translate former class paths in the files and values that it reads."""
    jsonargparse.set_loader("yaml", _load, exceptions=(yaml.YAMLError,))


def _load(text: str) -> Any:
    return translated(_plain_load(text))


_plain_load = jsonargparse.get_loader("yaml")


def translated(value: Any) -> Any:
    """Return a configuration with today's class paths."""
    if isinstance(value, list):
        return [translated(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {name: translated(item) for name, item in value.items()}
    path = value.get("class_path")
    if isinstance(path, str) and (now := _today(path, value.get("init_args"))) != path:
        warnings.warn(
            f"{path} is now {now}; the old name is accepted in this release only", UserWarning, stacklevel=2
        )
        value["class_path"] = now
    return value


def _today(path: str, init_args: Any) -> str:
    if path in _OBJECTIVES:
        reward = (init_args or {}).get("reward") if isinstance(init_args, dict) else None
        name = reward.get("class_path", "") if isinstance(reward, dict) else str(reward)
        return "rpt_lightning." + (
            "QuestionObjective" if name.endswith("AnswerReward") else "NextTokenObjective"
        )
    module, _, name = path.removeprefix("rpt_lightning.").rpartition(".")
    return f"rpt_lightning.{_MODULES[module]}.{name}" if module in _MODULES else path
