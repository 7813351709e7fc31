"""Class paths of earlier versions in configurations. They are accepted for one release, with a message."""

from __future__ import annotations

import warnings
from typing import Any

import jsonargparse
import yaml

# Their prompts and rewards are now named in the package itself.
_MODULES = ("rpt_lightning.tasks.prompt", "rpt_lightning.tasks.reward", "rpt_lightning.tasks.answer_reward")
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
    module, _, name = path.rpartition(".")
    return f"rpt_lightning.{name}" if module in _MODULES else path
