"""The stages of training a policy: fit, export and evaluate.

Precision and engine are those that suit this machine.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pipeline import EXECUTABLE, ROOT, Stage

from rpt_lightning.records.results import read_results, write_results
from rpt_lightning.training.cpu_precision import bf16_is_slow

# vLLM exists only for Linux. Elsewhere transformers generates the rollouts, which is slower.
HAS_VLLM = platform.system() == "Linux"
# Many CPUs have no instructions for bf16. There fp32 is several times faster, and no less exact.
IN_FP32 = bf16_is_slow()
PRECISION = ("--trainer.precision", "32-true") if IN_FP32 else ()
PREPARE_PRECISION = ("--precision", "32-true") if IN_FP32 else ()
ENGINE = (
    *(() if HAS_VLLM else ("--rollout.engine", "HFEngine")),
    *(("--rollout.engine.dtype", "float32") if IN_FP32 else ()),
)


def say_what_is_special(program: str) -> None:
    """Say where this machine departs from the configurations."""
    if not HAS_VLLM:
        print(
            f"{program}: there is no vLLM for {platform.system()}; transformers generates the rollouts, "
            "which takes longer than the times below"
        )
    if IN_FP32:
        print(
            f"{program}: this CPU has no instructions for bf16; everything is computed in fp32, which is "
            "faster here"
        )


def settings(config: str) -> dict[str, Any]:
    """Read a configuration of this project."""
    return yaml.safe_load((ROOT / config).read_text())


def flags(options: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(part) for option in options.items() for part in option)


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*.ckpt"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}.ckpt"


def results_file(run: Path, step: int = 0) -> Path:
    """Return the file of a validation's results. Step 0 is the validation of a model folder."""
    return run / "validation" / f"step-{step:06d}.jsonl"


def fit(
    name: str,
    run: Path,
    config: str,
    *,
    folder: Path,
    minutes: float,
    options: tuple[str, ...] = (),
    budget_like: Path | None = None,
) -> Stage:
    """Make the stage that trains into ``run`` up to the configuration's last step.

    With ``budget_like`` it trains until it has cost as many FLOPs as that run.
    """
    budget = (
        ()
        if budget_like is None
        else flags({"--budget.like": budget_like, "--budget.by": "flops", "--trainer.max_steps": 100_000})
    )

    def command() -> tuple[str, ...]:
        # A run that stopped before its first checkpoint has nothing to resume, so it starts again.
        resume = ("--ckpt_path", "last") if checkpoints(run) else ()
        return (EXECUTABLE, "fit", "--config", config, *PRECISION, *options, *budget, *resume)

    last = checkpoint(run, settings(config)["trainer"]["max_steps"])
    return Stage(
        name=name,
        command=command,
        output=last if budget_like is None else run / "checkpoints",
        output_comes_last=budget_like is None,
        minutes=minutes,
        folder=folder,
        run_folder=run,
    )


def export(run: Path, *, folder: Path) -> Stage:
    output = run / "export"

    def command() -> tuple[str, ...]:
        shutil.rmtree(output, ignore_errors=True)
        return (EXECUTABLE, "export", "--ckpt", str(checkpoints(run)[-1]), "--output", str(output))

    return Stage(name=f"export {run.name}", command=command, output=output, minutes=0.5, folder=folder)


def evaluate(
    name: str,
    policy: Path,
    run: Path,
    config: str,
    *,
    folder: Path,
    minutes: float,
    step: int = 0,
    ckpt: Path | None = None,
    controls: bool = True,
    options: tuple[str, ...] = (*PRECISION, *ENGINE),
) -> Stage:
    """Make the stage that evaluates a policy with and without reasoning.

    ``policy`` is a model folder. ``ckpt`` is a checkpoint (of ``step``) whose weights replace the folder's
    own. With ``controls`` the policy also answers after thoughts that are not its own. ``options`` are
    additional flags, by default those of this machine.
    """
    own: dict[str, object] = {
        "--model.policy.path": policy,
        "--trainer.default_root_dir": run,
        "--trainer.limit_val_batches": 1.0,
    }
    own |= ({"--rollout.evaluation.thought_controls": True} if controls else {}) | (
        {"--ckpt_path": ckpt} if ckpt is not None else {}
    )
    command = (EXECUTABLE, "validate", "--config", config, *options, *flags(own))
    return Stage(
        name=name,
        command=lambda: command,
        output=results_file(run, step),
        minutes=minutes,
        folder=folder,
        feeds_later=False,
    )


def report(
    run: Path, others: tuple[Path, ...], output: Path, *, before: Path, after: Path | None, folder: Path
) -> Stage:
    """Make the stage that builds a page about ``run`` beside others.

    It takes seconds, so it always runs, with whatever the other stages left. ``before`` and ``after`` are
    the evaluations of two model folders: the one that the run began with, and the one that its last
    checkpoint was exported to. ``after`` is None if the run validates its last step itself. In the run's own
    folder they become its first and its last step, which `rpt compare` and `rpt scaling` need too.
    """

    def command() -> tuple[str, ...]:
        last = int(checkpoints(run)[-1].stem.removeprefix("step-"))
        for evaluation, step in ((before, 0), (after, last)):
            if evaluation is None:
                continue
            write_results(replace(read_results(results_file(evaluation)), step=step), results_file(run, step))
        return (EXECUTABLE, "report", *map(str, (run, *others)), "--output", str(output))

    return Stage(
        name="report",
        command=command,
        output=output,
        minutes=0.2,
        folder=folder,
        always=True,
        feeds_later=False,
    )
