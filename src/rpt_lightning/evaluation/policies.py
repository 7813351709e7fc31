"""Policies to evaluate, the output folder, and the trainer that validates the policies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, Trainer

from rpt_lightning.evaluation.run import short_names
from rpt_lightning.training.checkpoint.file import check_about, read_checkpoint
from rpt_lightning.training.distributed.strategy import ShardedStrategy


def policy_names(policies: Sequence[str]) -> list[str]:
    """Return a short name for each policy.

    The name is also the policy's folder below that of the evaluation, so it is never absolute and never
    leads upwards.
    """
    places = [Path(os.path.abspath(one)) for one in policies]
    without_suffix = [place.with_suffix("") if place.suffix == ".ckpt" else place for place in places]
    # A checkpoint and a folder keep the suffix if their names differ in nothing else.
    return short_names(places if len(set(without_suffix)) < len(policies) else without_suffix)


def check_policies(policies: Sequence[str]) -> None:
    """Raise ValueError if a policy is named twice, even with different spellings."""
    written, resolved = {os.path.abspath(one) for one in policies}, {Path(one).resolve() for one in policies}
    if min(len(written), len(resolved)) < len(policies):
        raise ValueError(f"--policy {' '.join(policies)}: one is named twice")


def check_new_output(output: Path) -> None:
    """Raise ValueError if the folder is not empty."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(
            f"--output {output}: already holds an evaluation. Name a new folder; earlier results can be "
            "given with --against"
        )


def policy_source(policy: str) -> tuple[str, str | None]:
    """Return a policy's model folder and, if the policy is a checkpoint, its path."""
    path = Path(policy)
    if path.suffix != ".ckpt" and not path.is_file():
        return policy, None
    about = read_checkpoint(path, flag="--policy").about
    check_about(about, f"--policy {path}")
    return str(about["policy_path"]), policy


def evaluation_trainer(
    folder: Path,
    callbacks: list[Callback],
    *,
    ckpt_path: str | None,
    precision: Literal["32-true", "bf16-mixed"],
    accelerator: str,
) -> Trainer:
    """Build a trainer that validates and writes nothing to the folder except what the callbacks write."""
    return Trainer(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=1,
        # Only the strategy that writes shards can read them.
        strategy=ShardedStrategy() if ckpt_path is not None and Path(ckpt_path).is_dir() else "auto",
        precision=precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # its tensors cannot be gathered from shards
    )
