"""Measure how much of a step is overhead, and how much of it is weight sync.

    python benchmarks/bench_overhead.py

Overhead is everything except generation, forward and backward, and the optimizer. The benchmark runs a real
`rpt fit` of configs/demo-text.yaml in this process: vLLM engine, 32 tasks x 8 completions, step log,
TensorBoard. The policy is a random model of SmolLM2-135M's size, so its completions run to their limit and no
prediction is ever right. A stand-in for the reward rewards every other completion in half of the groups (in
the demo, about half of the groups have a gradient). A step is the time from its beginning to the beginning of
the next one. Generation is the time of the engine's `generate`. The rest of the rollouts counts as overhead,
and so does the step's share of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from model_folder import make_model_folder
from result import store

from rpt_lightning.cli import main as rpt
from rpt_lightning.objectives.rewards.next_token import Reward
from rpt_lightning.training.cpu_precision import bf16_is_slow
from rpt_lightning.types import AnsweredTask

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 2
OUR_PART = (
    "sync",
    "logprob_check",
    "pack",
    "log",
    "between_steps",
)  # named phases of the overhead; the rest of it has no name


class EveryOther(Reward):
    """Rewards every other completion, in the groups of about half of the tasks."""

    def group_rewards(self, answered: AnsweredTask) -> tuple[float, ...]:
        is_live = zlib.crc32(answered.task.task_id.encode()) % 2
        return tuple(float(is_live and index % 2) for index in range(len(answered.predictions)))


def prepare_tasks(folder: Path, model: Path, *, short: bool) -> Path:
    """Prepare positions with 120 to 190 tokens before them, in docstrings of the standard library."""
    from rpt_lightning.data.prepare.prepare_command import prepare
    from rpt_lightning.data.sources.corpus import DocstringSource

    prepare(
        DocstringSource("email", min_chars=300), str(folder), tokenizer=str(model), proxy=str(model),
        entropy_threshold=0.0, precision="32-true", min_context=20 if short else 120,
        max_tokens_per_document=40 if short else 190, heldout_documents=2, window=256, overlap=64,
        max_documents=16 if short else 80,
    )  # fmt: skip
    return folder


def run_config(folder: Path, *, steps: int, short: bool) -> dict[str, Any]:
    """Load configs/demo-text.yaml with another policy, other tasks and another reward."""
    config = yaml.safe_load((ROOT / "configs" / "demo-text.yaml").read_text())
    config["trainer"] |= {"default_root_dir": str(folder / "run"), "max_steps": steps}
    config["model"]["init_args"]["policy"]["init_args"]["path"] = str(folder / "model")
    config["data"]["init_args"] |= {"task_dir": str(folder / "tasks"), "num_eval_tasks": 8}
    config["rollout"]["objective"]["init_args"]["reward"] = {"class_path": "bench_overhead.EveryOther"}
    config["rollout"]["sampling"] |= {"max_completion_tokens": 24}
    if short or bf16_is_slow():  # as in the demo
        config["trainer"]["precision"] = "32-true"
        config["rollout"]["engine"]["init_args"]["dtype"] = "float32"
    if short:
        config["data"]["init_args"]["tasks_per_step"] = 8
        config["rollout"] |= {
            "engine": {"class_path": "HFEngine", "init_args": {"dtype": "float32"}},
            "group_size": 4,
        }
        config["rollout"]["sampling"] |= {"max_completion_tokens": 4}
    return config


def timed(owner: type, method: str) -> list[float]:
    """Record the seconds of every call of a method from now on."""
    seconds: list[float] = []
    function: Callable[..., Any] = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, method, call)
    return seconds


def run(folder: Path, args: argparse.Namespace) -> tuple[list[dict[str, float]], list[float], list[float]]:
    """Return the lines of the step log, and the seconds of each call of `generate` and of each checkpoint."""
    from rpt_lightning.rollout.engines.base import RolloutEngine
    from rpt_lightning.training.checkpoint.callback import RunCheckpoint

    model = make_model_folder(folder / "model", short=args.short)
    # The tasks only need the tokenizer, so the tiny model scores them.
    prepare_tasks(
        folder / "tasks",
        model if args.short else make_model_folder(folder / "tiny", short=True),
        short=args.short,
    )
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(run_config(folder, steps=WARM_UP_STEPS + args.steps, short=args.short)))
    generations, checkpoints = timed(RolloutEngine, "generate"), timed(RunCheckpoint, "save")
    if rpt(["fit", "--config", str(config)]):
        raise SystemExit("the run failed")
    lines = [json.loads(line) for line in (folder / "run" / "steps.jsonl").read_text().splitlines()]
    if len(generations) != len(lines):
        raise SystemExit(
            f"{len(lines)} steps called the engine {len(generations)} times, so calls cannot be matched to "
            "steps"
        )
    return lines, generations, checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=5, help=f"measured steps, after {WARM_UP_STEPS} for warm-up"
    )
    parser.add_argument(
        "--short", action="store_true", help="run a tiny model with transformers as engine, store nothing"
    )
    args = parser.parse_args()
    if args.short:
        args.steps = 1
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as temporary:
        lines, generations, checkpoints = run(Path(temporary), args)

    lines, generations = lines[WARM_UP_STEPS:], generations[WARM_UP_STEPS:]
    checkpoint_s = (
        checkpoints[-1]
        / yaml.safe_load((ROOT / "configs" / "demo-text.yaml").read_text())["checkpoint"]["every_n_steps"]
    )
    # No checkpoint falls between the measured steps, because the run's only one is at its end.
    assert len(checkpoints) == 1
    num = len(lines)
    seconds = {
        name: sum(line[f"time/{name}_s"] for line in lines) / num
        for name in (*OUR_PART, "rollout", "forward_backward", "optimizer", "step")
    }
    seconds |= {"generate": sum(generations) / num, "checkpoint": checkpoint_s}
    whole = seconds["step"] + seconds["between_steps"] + checkpoint_s
    seconds["rest of rollout"] = seconds["rollout"] - seconds["generate"]
    named = [*OUR_PART, "generate", "rest of rollout", "forward_backward", "optimizer", "checkpoint"]
    seconds["not named"] = whole - sum(seconds[name] for name in named)
    print(f"mean of {num} steps of {whole:.1f} s:")
    for name in [*named, "not named"]:
        print(f"  {name:<17} {seconds[name]:8.3f} s {seconds[name] / whole:7.2%}")
    print(
        f"  perf/tokens_per_s {sum(line['perf/tokens_per_s'] for line in lines) / num:.0f}, "
        f"live groups {lines[-1]['rollout/live_groups_frac']:.0%}"
    )
    if not args.short and whole < 10:
        print("note: the target applies to steps of 10 s or more")
    if any(line["optim/grad_norm"] == 0 for line in lines) or abs(seconds["not named"]) > max(
        0.01 * whole, 0.05
    ):
        raise SystemExit("nothing was trained, or more than 1 % of the step has no name")
    overhead = whole - seconds["generate"] - seconds["forward_backward"] - seconds["optimizer"]
    phases = {name: round(value, 4) for name, value in seconds.items()}
    options = {"limit": 0.0, "keep": not args.short, "steps": num, "phases_s": phases}
    store(
        "step-overhead",
        overhead / whole,
        target=0.05,
        unit="of a step is spent outside generation, forward and backward, and the optimizer",
        **options,
    )
    store(
        "step-sync",
        seconds["sync"] / whole,
        target=0.02,
        unit="of a step is spent on the weight sync, including its verification",
        **options,
    )


if __name__ == "__main__":
    main()
