"""Compare a whole RPT step with TRL's, and an adapter's step with a full one.

    python benchmarks/bench_whole_step.py

A whole step has rollouts, rewards, training and, in our case, the weight sync. Three runs answer the same
prompts, one after the other and each in its own process, and then the first one runs again:

- ours: `rpt fit` with configs/demo-text.yaml, as in bench_overhead.py;
- ours with a low-rank adapter, of which only the adapter is sent to the engine;
- TRL 1.16's `GRPOTrainer` with its own generation (transformers' `generate`).

All use a random model of SmolLM2-135M's size in fp32, groups of 8, and completions that run to their limit,
because a random model almost never ends one. The same completions are rewarded on both sides, so that half
of the groups have a gradient. TRL gets the settings that make it fast: no reference model, no second
forward pass for old log-probs (it generates once per optimizer step), no gradient checkpointing, and one
generation batch for all completions. It trains in batches of `--rows` completions. It trains every group,
also those without a gradient. Ours leaves them out and shares prefixes. The limit is what the FLOPs of both
sides allow. TRL takes part if it is installed (`make bench` installs it).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import machine
import yaml
from bench_overhead import WARM_UP_STEPS, prepare_tasks, run_config
from lightning.pytorch import Callback
from model_folder import make_model_folder
from result import keep_rounds, store

GROUP, COMPLETION, TEMPERATURE = 8, 24, 0.8
ADAPTER = {"rank": 16, "alpha": 32, "targets": "all-linear"}
SIDES = ("full", "adapter", "trl", "full again")
OPTIONS = ("tasks", "completion", "steps", "trl_steps", "rows")  # each side's process gets them


class KeepPrompts(Callback):
    """Leaves the prompts of a run's first step in a file, as texts with their lengths in tokens."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            prompts = [group.prompt_ids for group in batch.rollouts.groups]
            texts = [pl_module.tokenizer.decode(list(ids)) for ids in prompts]
            self.path.write_text(json.dumps({"texts": texts, "lengths": list(map(len, prompts))}))


def run_ours(folder: Path, side: str, args: argparse.Namespace) -> None:
    """Train with `rpt fit`, and leave the measured steps and the prompts of the first one in a file."""
    from rpt_lightning.cli import main as rpt

    config = run_config(folder, steps=WARM_UP_STEPS + args.steps, short=args.short)
    config["trainer"]["default_root_dir"] = str(folder / side)
    config["trainer"]["precision"] = "32-true"
    config["rollout"]["engine"]["init_args"]["dtype"] = "float32"
    config["rollout"]["sampling"] |= {"max_completion_tokens": args.completion, "temperature": TEMPERATURE}
    config["rollout"]["group_size"] = GROUP
    config["data"]["init_args"]["tasks_per_step"] = args.tasks
    config["trainer"]["callbacks"] = [
        {"class_path": "bench_whole_step.KeepPrompts", "init_args": {"path": str(folder / "prompts.json")}}
    ]
    if side == "adapter":
        config["model"]["init_args"]["policy"]["init_args"]["adapter"] = ADAPTER
        if not args.short:  # transformers' engine has none
            config["rollout"]["engine"]["init_args"]["max_adapter_rank"] = ADAPTER["rank"]
    path = folder / f"{side}.yaml"
    path.write_text(yaml.safe_dump(config))
    if rpt(["fit", "--config", str(path)]):
        raise SystemExit(f"{side}: the run failed")
    lines = [json.loads(line) for line in (folder / side / "steps.jsonl").read_text().splitlines()]
    lines = lines[WARM_UP_STEPS:]
    if any(line["optim/grad_norm"] == 0 for line in lines):
        raise SystemExit(f"{side}: nothing was trained")
    _leave(folder, side, {"steps": lines})


def run_trl(folder: Path, args: argparse.Namespace) -> None:
    """Train with TRL's GRPOTrainer, and leave the seconds of each measured step in a file."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    kept = json.loads((folder / "prompts.json").read_text())
    prompts: list[str] = kept["texts"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if [len(tokenizer(prompt)["input_ids"]) for prompt in prompts] != kept["lengths"]:
        raise SystemExit("TRL would see other prompts than we did")
    rows = GROUP * len(prompts)
    settings = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        max_steps=args.trl_steps, learning_rate=2e-5, weight_decay=0.01, max_grad_norm=0.2,
        lr_scheduler_type="constant", optim="adamw_torch", gradient_checkpointing=False,
        per_device_train_batch_size=args.rows, gradient_accumulation_steps=rows // args.rows,
        steps_per_generation=rows // args.rows, num_generations=GROUP, num_iterations=1, beta=0.0,
        temperature=TEMPERATURE, top_k=0, max_completion_length=args.completion, use_vllm=False,
        generation_kwargs={"min_new_tokens": args.completion},
        logging_steps=1000, disable_tqdm=True, shuffle_dataset=False, dataloader_num_workers=0,
    )  # fmt: skip

    class Times(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self._start)

    lengths: list[int] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(zlib.crc32(prompt.encode()) % 2 and index % 2) for index, prompt in enumerate(prompts)]

    times = Times()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts * args.trl_steps}),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    _leave(folder, "trl", {"seconds": times.seconds, "mean_completion": sum(lengths) / len(lengths)})


def _leave(folder: Path, side: str, what: dict[str, Any]) -> None:
    (folder / f"{side}.json").write_text(json.dumps(what))


def trl_flops(folder: Path, lengths: list[int], completion: int) -> float:
    """FLOPs of TRL's step: every row is generated and trained by itself, without padding."""
    from transformers import AutoModelForCausalLM

    from rpt_lightning.policy.flops import (
        add_works,
        forward_flops,
        model_size,
        prompt_work,
        sampling_work,
        sequence_work,
        train_flops,
    )
    from rpt_lightning.types import TrainSequence

    size = model_size(AutoModelForCausalLM.from_pretrained(folder / "model"))
    rows = [length for length in lengths for _ in range(GROUP)]
    generated = add_works(
        work for length in rows for work in (prompt_work(length), sampling_work(length, completion))
    )
    trained = add_works(
        sequence_work(TrainSequence(prompt_ids=(0,) * length, target_ids=(0,) * completion))
        for length in rows
    )
    return forward_flops(size, generated) + train_flops(size, trained)


def mean(lines: list[dict[str, float]], *names: str) -> float:
    return sum(line[name] for line in lines for name in names) / len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=16, help="prompts of a step")
    parser.add_argument("--completion", type=int, default=COMPLETION, help="tokens of each completion")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each of our runs")
    parser.add_argument("--trl_steps", type=int, default=2, help="steps of TRL; the first one warms up")
    parser.add_argument("--rows", type=int, default=8, help="completions in one of TRL's training batches")
    parser.add_argument("--short", action="store_true", help="run a tiny model and store nothing")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.short:
        args.tasks, args.completion, args.steps = 8, 4, 1
    if args.side == "trl":
        run_trl(args.folder, args)
    elif args.side:
        run_ours(args.folder, args.side, args)
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Run all sides and store the figures."""
    sides = [side for side in SIDES if side != "trl" or importlib.util.find_spec("trl") is not None]
    if "trl" not in sides:
        print("trl is not installed, so it is not measured")
    with tempfile.TemporaryDirectory(prefix="bench-whole-step-") as temporary:
        folder = Path(temporary)
        model = make_model_folder(folder / "model", short=args.short)
        scorer = model if args.short else make_model_folder(folder / "tiny", short=True)
        prepare_tasks(folder / "tasks", scorer, short=args.short)
        load, found = machine.OtherLoad(), {}
        options = [f"--{name}={getattr(args, name)}" for name in OPTIONS]
        for side in sides:
            print(f"--- {side}", flush=True)
            command = [sys.executable, __file__, "--side", side, "--folder", str(folder), *options]
            subprocess.run(command + (["--short"] if args.short else []), check=True)
            found[side] = json.loads((folder / f"{side}.json").read_text())
        share = load.share()
        lengths = json.loads((folder / "prompts.json").read_text())["lengths"]
        flops = trl_flops(folder, lengths, args.completion) if "trl" in found else 0.0
    full, adapter = found["full"]["steps"] + found["full again"]["steps"], found["adapter"]["steps"]
    steps = {
        name: [line["time/step_s"] + line["time/between_steps_s"] for line in lines]
        for name, lines in (("ours", full), ("adapter", adapter))
    }
    if "trl" in found:
        steps["trl"] = found["trl"]["seconds"][1:] or found["trl"]["seconds"]
    seconds = keep_rounds(steps, other_load=share)
    shape = f"p{max(lengths)}-c{args.completion}-g{GROUP}-t{args.tasks}"
    keep = not args.short
    training = ("time/forward_backward_s", "time/optimizer_s")
    if "trl" in found:
        print(f"  TRL's completions have {found['trl']['mean_completion']:.1f} tokens on average")
        store(
            f"whole-step-vs-trl-{shape}", seconds["trl"] / seconds["ours"], keep=keep,
            limit=flops / mean(full, "cost/flops"), target=5.0, lower_is_better=False,
            unit="times as fast as a whole step of TRL 1.16's GRPOTrainer", trl_flops=flops,
            live_groups=mean(full, "rollout/live_groups_frac"), trl_rows=args.rows,
            all_seconds={name: [round(value, 2) for value in values] for name, values in steps.items()},
        )  # fmt: skip
    store(
        f"adapter-step-vs-full-{shape}", mean(full, *training) / mean(adapter, *training), keep=keep,
        # Forward and the gradient of the activations stay. The gradient of the weights and the optimizer go.
        limit=1.5 * mean(full, *training) / mean(full, training[0]), target=1.0, lower_is_better=False,
        unit="times as fast as full training: forward, backward and optimizer",
    )  # fmt: skip
    store(
        f"adapter-sync-{shape}", mean(adapter, "time/sync_s") / seconds["adapter"], keep=keep, limit=0.0,
        target=0.02, unit="of a step is spent on syncing the adapter, including its verification",
    )  # fmt: skip


if __name__ == "__main__":
    main()
