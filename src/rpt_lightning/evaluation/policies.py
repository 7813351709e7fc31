"""Policies to evaluate: their names, their validation one after the other, and the output folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningDataModule, Trainer

from rpt_lightning.evaluation.run_reader import short_names
from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.model import Policy
from rpt_lightning.training.checkpoint.adapter import saved_adapter
from rpt_lightning.training.checkpoint.reader import check_about, read_checkpoint
from rpt_lightning.training.distributed.strategy import ShardedStrategy
from rpt_lightning.training.library_noise import quieten_libraries
from rpt_lightning.training.modules.ntp_module import NTPModule

SUMMARY = "summary.md"


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluation:
    """The validation of several policies in turn, with one folder for each in ``output``.

    Raises ValueError if a policy is named twice.
    """

    policies: Sequence[str]
    output: Path
    precision: Literal["32-true", "bf16-mixed"]
    accelerator: str

    def __post_init__(self) -> None:
        check_policies(self.policies)

    def begin(self) -> None:
        """Silence the libraries' notes. Raises ValueError if the output already holds something."""
        quieten_libraries()
        check_new_output(self.output)

    def run(
        self, parts: Callable[[NTPModule], tuple[LightningDataModule, list[Callback]]]
    ) -> Iterator[tuple[str, Path]]:
        """Validate each policy, and yield its name and the folder that holds its records.

        ``parts`` returns the data and the callbacks for a policy. One of the callbacks writes the records.
        """
        for policy, name in zip(self.policies, policy_names(self.policies), strict=True):
            path, ckpt_path, adapter = policy_source(policy)
            module = NTPModule(Policy(path, adapter=adapter))
            data, callbacks = parts(module)
            trainer = evaluation_trainer(
                self.output / name,
                callbacks,
                ckpt_path=ckpt_path,
                precision=self.precision,
                accelerator=self.accelerator,
            )
            trainer.validate(module, data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
            yield name, self.output / name

    def write_summary(self, text: str, *, beside: str) -> None:
        """Write and print the summary. ``beside`` says what else the output folder holds."""
        (self.output / SUMMARY).write_text(text, encoding="utf-8")
        print(f"\n{text}\n{self.output / SUMMARY}; {beside}")


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


def policy_source(policy: str) -> tuple[str, str | None, Adapter | None]:
    """Return a policy's folder and, if the policy is a checkpoint, its path and the adapter that it holds."""
    path = Path(policy)
    if path.suffix != ".ckpt" and not path.is_file():
        return policy, None, None
    about = read_checkpoint(path, flag="--policy").about
    check_about(about, f"--policy {path}")
    saved = saved_adapter(about, f"--policy {path}")
    # In fp32, which any precision of the evaluation can take.
    adapter = None if saved is None else replace(saved[0], base_dtype="float32")
    return str(about["policy_path"]), policy, adapter


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
