"""What a checkpoint says about the adapter that it holds, and whether a policy has the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.model import Policy
from rpt_lightning.pretrained.adapter_folder import check_base

ENTRY = "adapter"


def about_adapter(policy: Policy) -> dict[str, Any]:
    """Return the checkpoint's entry about the adapter. Empty if the policy has none."""
    if policy.adapter is None:
        return {}
    about = {"settings": policy.adapter.about(), "base": policy.model_path, "base_hash": policy.base_hash}
    return {ENTRY: about}


def saved_adapter(about: Mapping[str, Any], where: str) -> tuple[Adapter, str, str] | None:
    """Return the settings, base and base's hash of the adapter that a checkpoint holds, if it holds one.

    Raises:
        ValueError: The entry is damaged. ``where`` begins the message.
    """
    entry = about.get(ENTRY)
    if entry is None:
        return None
    try:
        return Adapter(**entry["settings"]), str(entry["base"]), str(entry["base_hash"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: its entry 'rpt.{ENTRY}' is {entry!r}, so the file was edited or is damaged ({error}); "
            "name another of the run's checkpoints/"
        ) from error


def check_same_adapter(about: Mapping[str, Any], policy: Policy, where: str) -> None:
    """Raise ValueError unless a checkpoint's adapter is one for this policy.

    Only ``base_dtype`` may differ, since it changes no result. The base's weights are compared once the
    policy has read them.
    """
    saved = saved_adapter(about, where)
    if saved is None and policy.adapter is None:
        return
    if saved is None:
        raise ValueError(
            f"{where}: the checkpoint holds all weights of a model, but the config has an adapter; leave "
            "model.policy.adapter out, or start a new run from the model that `rpt export` makes of the "
            "checkpoint"
        )
    settings, base, base_hash = saved
    if policy.adapter is None:
        raise ValueError(
            f"{where}: the checkpoint holds an adapter of {base}, but the config has none; give "
            f"{_as_flags(settings.about())}, or the model that `rpt export` makes of the checkpoint"
        )
    ours, theirs = (_what_decides(adapter) for adapter in (policy.adapter, settings))
    if differing := {name: theirs[name] for name in ours if ours[name] != theirs[name]}:
        raise ValueError(
            f"{where}: the checkpoint's adapter was made with other settings; give "
            f"{_as_flags(differing)}, or start a new run"
        )
    if policy.base_hash is not None:
        check_base(policy.base_hash, base_hash, where=where, base=policy.model_path)


def _what_decides(adapter: Adapter) -> dict[str, Any]:
    settings = adapter.about()
    if isinstance(settings["targets"], list):
        settings["targets"] = sorted(set(settings["targets"]))
    return {name: value for name, value in settings.items() if name != "base_dtype"}


def _as_flags(settings: Mapping[str, Any]) -> str:
    """Write settings as flags.

    >>> _as_flags({"rank": 8, "targets": ["q_proj"]})
    '--model.policy.adapter.rank 8 --model.policy.adapter.targets ["q_proj"]'
    """
    return " ".join(
        f"--model.policy.adapter.{name} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    )
