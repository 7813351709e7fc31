"""Names of earlier versions: class paths in configurations, and settings of rollouts that are now in groups.

They are accepted for one release, with a message.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
    "rollout.vllm_engine": "rollout.engines.vllm.vllm_engine",
    "rollout.vllm_server_engine": "rollout.servers.server_engine",
    "rollout.weight_transport": "rollout.weight_sync.transport",
    "rollout.vllm_nccl_transport": "rollout.weight_sync.nccl_transport",
    "training.module": "training.modules.rpt_module",
    "training.ntp_module": "training.modules.ntp_module",
    "training.strategy": "training.distributed.strategy",
}
_OBJECTIVES = ("rpt_lightning.tasks.objective.Objective", "rpt_lightning.Objective", "Objective")
# Settings that stood directly under ``rollout``, and where they stand there now.
_MOVED = {
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "max_completion_tokens": "sampling.max_completion_tokens",
    "stop_after_first_box": "sampling.stop_after_first_box",
    "dynamic_sampling_from_step": "dynamic_sampling.from_step",
    "dynamic_sampling_max_factor": "dynamic_sampling.max_factor",
    "verify_sequences": "check.verify_sequences",
    "logprob_tolerance": "check.logprob_tolerance",
    "eval_samples": "evaluation.samples",
    "thought_controls": "evaluation.thought_controls",
}
_FLAG = "--rollout."


def accept_former_names() -> None:
    """Make every parser translate former names in the files and values that it reads."""
    jsonargparse.set_loader("yaml", _load, exceptions=(yaml.YAMLError,))


def _load(text: str) -> Any:
    return translated(_plain_load(text))


_plain_load = jsonargparse.get_loader("yaml")


def translated(value: Any) -> Any:
    """Return a configuration with today's names.

    Raises ValueError if it gives a setting under both its names.
    """
    if isinstance(value, list):
        return [translated(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {name: translated(item) for name, item in value.items()}
    if isinstance(value.get("rollout"), dict):
        value["rollout"] = _grouped(value["rollout"])
    path = value.get("class_path")
    if isinstance(path, str) and (now := _today(path, value.get("init_args"))) != path:
        _warn(path, now)
        value["class_path"] = now
    return value


def translated_flags(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with today's flags."""
    return [_flag_today(word) for word in words]


def _flag_today(word: str) -> str:
    flag, equals, value = word.partition("=")
    name = flag.removeprefix(_FLAG)
    if not flag.startswith(_FLAG) or name not in _MOVED:
        return word
    now = _FLAG + _MOVED[name]
    _warn(flag, now)
    return now + equals + value


def _grouped(rollout: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of rollouts in today's groups."""
    grouped = {name: item for name, item in rollout.items() if name not in _MOVED}
    for former, path in _MOVED.items():
        if former not in rollout:
            continue
        group, name = path.split(".")
        settings = grouped.get(group) or {}
        if not isinstance(settings, dict) or name in settings:
            raise ValueError(
                f"rollout.{former}={rollout[former]}: it is the former name of rollout.{path}, which is set "
                f"as well; remove rollout.{former}"
            )
        _warn(f"rollout.{former}", f"rollout.{path}")
        grouped[group] = {**settings, name: rollout[former]}
    return grouped


def _warn(former: str, now: str) -> None:
    warnings.warn(
        f"{former} is now {now}; the old name is accepted in this release only", UserWarning, stacklevel=3
    )


def _today(path: str, init_args: Any) -> str:
    if path in _OBJECTIVES:
        reward = (init_args or {}).get("reward") if isinstance(init_args, dict) else None
        name = reward.get("class_path", "") if isinstance(reward, dict) else str(reward)
        return "rpt_lightning." + (
            "QuestionObjective" if name.endswith("AnswerReward") else "NextTokenObjective"
        )
    module, _, name = path.removeprefix("rpt_lightning.").rpartition(".")
    return f"rpt_lightning.{_MODULES[module]}.{name}" if module in _MODULES else path
