"""Any number of ranks and any way to cut a step give the same run.

The tasks, losses, metrics, weights, checkpoints and validation are the same.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rpt_lightning.data.modules.stream import rank_share
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.export import export
from rpt_lightning.records.results import read_results
from rpt_lightning.training.checkpoint.callback import last_checkpoint

STEPS = 10
# A step's cost depends on how it is cut, and each rank compares log-probs of its own completions.
CUT = (
    "time",
    "perf/",
    "cost/",
    "sync/",
    "train/packed_tokens",
    "train/micro_batches",
    "train/rank_imbalance",
    "step",
)


def run(folder: Path, model: Path, tasks: Path, **options):
    arguments = json.dumps({"folder": str(folder), "model": str(model), "tasks": str(tasks)} | options)
    script = Path(__file__).with_name("rank_run.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, script, arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def weights(model_folder: Path) -> torch.Tensor:
    tensors = {
        name: tensor
        for path in sorted(model_folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _without_logprobs(row: dict) -> dict:
    """Compares exactly what was drawn and rewarded. Log-probs come from weights that agree up to rounding."""
    return {name: value for name, value in row.items() if name != "logprobs"}


class Outcome:
    def __init__(self, folder: Path, model: Path) -> None:
        if not (folder / "hf").exists():
            export(str(last_checkpoint(folder)), str(folder / "hf"))
        self.start, self.end = weights(model), weights(folder / "hf")
        self.metrics = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        self.rollouts = [
            [_without_logprobs(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
            for path in sorted((folder / "rollouts").glob("*"))
        ]

    def distance(self, other: Outcome) -> float:
        """Distance of the weights, as a share of the update."""
        return ((self.end - other.end).norm() / (other.end - other.start).norm()).item()

    def lives(self) -> list[list[bool]]:
        """Whether each group of each step has differing rewards, with 4 completions a group."""
        groups = [[step[start : start + 4] for start in range(0, len(step), 4)] for step in self.rollouts]
        return [[len({row["reward"] for row in group}) > 1 for group in step] for step in groups]


def assert_same_run(one: Outcome, other: Outcome, tolerance: float = 0.01) -> None:
    assert other.rollouts == one.rollouts
    assert one.distance(other) < tolerance
    for ours, theirs in zip(one.metrics, other.metrics, strict=True):
        names = [name for name in ours if not name.startswith(CUT)]
        assert names == [name for name in theirs if not name.startswith(CUT)]
        assert {
            "reward/mean",
            "loss/total",
            "loss/ratio_mean",
            "correction/raw_max",
            "policy/entropy",
            "optim/grad_norm",
        } <= set(names)
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.long
def test_rpt_is_the_same_run_on_any_number_of_ranks(tiny_model_dir, tiny_task_dir, tmp_path):
    def outcome(name, **options):
        run(tmp_path / name, tiny_model_dir, tiny_task_dir, steps=STEPS, **options)
        return Outcome(tmp_path / name, tiny_model_dir)

    one = outcome("one")
    assert len(one.lives()) == STEPS
    assert all(any(step) for step in one.lives())
    # Two things make it hard: completions of many lengths, and steps in which one rank of 4 (and of 2) has no
    # group with a gradient.
    assert len({len(row["completion"]) for step in one.rollouts for row in step}) > 5
    for num_ranks in (2, 4):
        assert any(
            not any(rank_share(step, rank=rank, num_ranks=num_ranks))
            for step in one.lives()
            for rank in range(num_ranks)
        )
    assert_same_run(one, outcome("small", micro_batch_tokens=100))
    assert_same_run(one, outcome("two", ranks=2, strategy="sharded", micro_batch_tokens=300))
    assert_same_run(one, outcome("four", ranks=4, strategy="sharded", micro_batch_tokens=100))
    assert_same_run(one, outcome("ddp", ranks=2, strategy="ddp"))
    # A fault shows if ranks have different numbers of tokens (of 3 tasks one and two), and under SGD: AdamW
    # divides by the gradient's size.
    uneven = {"optimizer": "SGD", "tasks_per_step": 3}
    one = outcome("one-uneven", **uneven)
    assert_same_run(one, outcome("two-uneven", ranks=2, strategy="sharded", **uneven))
    wrong = outcome("wrong", ranks=2, strategy="sharded", wrong_normalizer=True, **uneven)
    assert wrong.rollouts == one.rollouts
    assert one.distance(wrong) > 0.05
    # At the first step that learns, the weights are still the same. The loss itself may be near 0 on policy,
    # where every ratio is 1.
    ours, theirs = next(
        (a, b) for a, b in zip(one.metrics, wrong.metrics, strict=True) if a["optim/grad_norm"] > 0
    )
    assert not math.isclose(ours["optim/grad_norm"], theirs["optim/grad_norm"], rel_tol=1e-2)


@pytest.mark.long
def test_mini_batches_are_the_same_on_any_number_of_ranks(tiny_model_dir, tiny_task_dir, tmp_path):
    """There are 8 groups in 3 mini-batches.

    So ranks have different numbers of them, and one of 4 has none in some mini-batches.
    """
    options = {"steps": 6, "optimizer": "SGD", "lr": 0.1, "optimizer_steps_per_batch": 3}
    more = {
        "one": {},
        "two": {"ranks": 2, "strategy": "sharded"},
        "four": {"ranks": 4, "strategy": "sharded", "micro_batch_tokens": 100},
    }
    for name, of_run in more.items():
        run(tmp_path / name, tiny_model_dir, tiny_task_dir, **options, **of_run)
    one, two, four = (Outcome(tmp_path / name, tiny_model_dir) for name in more)
    assert len(one.lives()) == 2
    assert any(one.lives()[0])
    assert_same_run(one, two)
    assert_same_run(one, four)


@pytest.mark.long
def test_contexts_are_trained_alike_on_any_number_of_ranks(tiny_model_dir, tiny_task_dir, tmp_path):
    """There are 5 tasks, 2 of a document. So a document lies on two ranks, which must count it once."""
    options = {"steps": 4, "optimizer": "SGD", "lr": 0.1, "tasks_per_step": 5, "ntp_weight": 0.3}
    more = {
        "one": {},
        "small": {"micro_batch_tokens": 60},
        "two": {"ranks": 2, "strategy": "sharded", "micro_batch_tokens": 100},
        "ddp": {"ranks": 2, "strategy": "ddp"},
    }
    for name, of_run in more.items():
        run(tmp_path / name, tiny_model_dir, tiny_task_dir, **options, **of_run)
    one, *others = (Outcome(tmp_path / name, tiny_model_dir) for name in more)
    assert all(step["loss/ntp"] > 0 < step["train/ntp_tokens"] for step in one.metrics)
    for other in others:
        assert_same_run(one, other, tolerance=1e-3)


@pytest.mark.long
def test_dynamic_sampling_draws_the_same_on_any_number_of_ranks(tiny_model_dir, tiny_task_dir, tmp_path):
    outcomes = []
    for num_ranks in (1, 2):
        options = {
            "ranks": num_ranks,
            "strategy": "ddp" if num_ranks > 1 else "auto",
            "dynamic_sampling_from_step": 1,
        }
        run(tmp_path / str(num_ranks), tiny_model_dir, tiny_task_dir, steps=3, **options)
        outcomes.append(Outcome(tmp_path / str(num_ranks), tiny_model_dir))
    assert outcomes[0].metrics[1]["rollout/replaced_groups"] > 0
    assert_same_run(*outcomes)


@pytest.mark.long
def test_the_same_tasks_are_selected_on_any_number_of_ranks(tiny_model_dir, tiny_task_dir, tmp_path):
    """There are 5 tasks, so ranks have different numbers of places. Dynamic sampling draws as well."""
    options = {
        "steps": 3,
        "optimizer": "SGD",
        "lr": 0.1,
        "tasks_per_step": 5,
        "dynamic_sampling_from_step": 1,
        "selection": {"min_true_prob": 0.0018, "max_draws": 4, "by_kind": True},
    }
    more = {
        "one": {},
        "two": {"ranks": 2, "strategy": "sharded", "micro_batch_tokens": 100},
        "four": {"ranks": 4, "strategy": "sharded", "strategy_options": {"tensor_parallel_size": 2}},
    }
    for name, of_run in more.items():
        run(tmp_path / name, tiny_model_dir, tiny_task_dir, **options, **of_run)
    one, *others = (Outcome(tmp_path / name, tiny_model_dir) for name in more)
    assert all(step["selection/drawn"] > step["selection/kept"] for step in one.metrics)
    assert any(step["selection/accepted"] < step["selection/in_band"] for step in one.metrics)
    assert sum(step["rollout/replaced_groups"] for step in one.metrics) > 0
    for other in others:
        assert_same_run(one, other)


@pytest.mark.long
def test_a_budget_and_tiers_are_the_same_on_any_number_of_ranks(tiny_model_dir, tiny_task_dir, tmp_path):
    """One rank, two, and two that resume on one: the same tasks, prompts and rewards at every step."""
    folder = TaskFolder(tiny_task_dir, "train")
    entropy = np.concatenate([folder.document(index)["entropy"] for index in range(len(folder))])
    options = {
        "dynamic_sampling_from_step": 0,
        "thought_budget": {"initial": 24, "steps": 4, "decay": 0.75, "weight": 0.25},
        "tiers": {
            "bounds": [float(np.median(entropy))], "first": [0.9, 0.1], "last": [0.1, 0.9], "steps": 4,
        },
    }  # fmt: skip
    ddp = {"ranks": 2, "strategy": "ddp"}
    run(tmp_path / "one", tiny_model_dir, tiny_task_dir, steps=4, **options)
    run(tmp_path / "two", tiny_model_dir, tiny_task_dir, steps=4, **options, **ddp)
    run(tmp_path / "parts", tiny_model_dir, tiny_task_dir, steps=2, **options, **ddp)
    run(tmp_path / "parts", tiny_model_dir, tiny_task_dir, steps=4, resume=True, **options)
    one, two, parts = (Outcome(tmp_path / name, tiny_model_dir) for name in ("one", "two", "parts"))
    assert [step["rollout/thought_budget"] for step in one.metrics] == [24, 22, 20, 19]
    assert sum(step["rollout/replaced_groups"] for step in one.metrics) > 0
    assert_same_run(one, two)
    assert parts.rollouts == one.rollouts


@pytest.mark.long
def test_tensor_parallel_ranks_are_one(tiny_model_dir, tiny_task_dir, tmp_path):
    run(tmp_path / "one", tiny_model_dir, tiny_task_dir, steps=3)
    run(
        tmp_path / "tp",
        tiny_model_dir,
        tiny_task_dir,
        steps=3,
        ranks=4,
        strategy="sharded",
        strategy_options={"tensor_parallel_size": 2},
    )
    assert_same_run(Outcome(tmp_path / "one", tiny_model_dir), Outcome(tmp_path / "tp", tiny_model_dir))


@pytest.mark.long
def test_a_sharded_run_goes_on_with_another_number_of_ranks(tiny_model_dir, tiny_task_dir, tmp_path):
    whole = tmp_path / "whole"
    run(whole, tiny_model_dir, tiny_task_dir, steps=4, ranks=2, strategy="sharded")
    run(tmp_path / "half", tiny_model_dir, tiny_task_dir, steps=2, ranks=2, strategy="sharded")
    for num_ranks, tolerance in ((2, 0.0), (1, 1e-3), (4, 1e-3)):
        folder = tmp_path / f"on-{num_ranks}"
        subprocess.run(["cp", "-r", tmp_path / "half", folder], check=True)
        run(folder, tiny_model_dir, tiny_task_dir, steps=4, ranks=num_ranks, strategy="sharded", resume=True)
        resumed, undisturbed = Outcome(folder, tiny_model_dir), Outcome(whole, tiny_model_dir)
        assert resumed.distance(undisturbed) <= tolerance, num_ranks
        assert_same_run(resumed, undisturbed)  # the cursor gives the same tasks in steps 3 and 4
    # From one file to shards.
    run(tmp_path / "file", tiny_model_dir, tiny_task_dir, steps=2)
    run(tmp_path / "file", tiny_model_dir, tiny_task_dir, steps=4, ranks=2, strategy="sharded", resume=True)
    assert_same_run(Outcome(tmp_path / "file", tiny_model_dir), Outcome(whole, tiny_model_dir))


@pytest.mark.long
def test_moments_in_host_memory_change_nothing(tiny_model_dir, tiny_task_dir, tmp_path):
    """Neither the weights nor what a sharded checkpoint holds, whichever kind of run resumes it."""
    common = {"ranks": 2, "strategy": "sharded"}
    run(tmp_path / "whole", tiny_model_dir, tiny_task_dir, steps=4, **common)
    whole = Outcome(tmp_path / "whole", tiny_model_dir)
    for first, second in ((True, True), (True, False), (False, True)):
        folder = tmp_path / f"{first} {second}"
        run(folder, tiny_model_dir, tiny_task_dir, steps=2, offload_moments=first, **common)
        run(folder, tiny_model_dir, tiny_task_dir, steps=4, offload_moments=second, resume=True, **common)
        assert torch.equal(Outcome(folder, tiny_model_dir).end, whole.end), (first, second)


@pytest.mark.long
def test_two_ranks_with_an_engine_each(tiny_model_dir, tiny_task_dir, tmp_path):
    """Completions may differ in a tie that rounding decides. With this model none does."""
    for name, options in {"one": {}, "two": {"ranks": 2, "strategy": "sharded"}}.items():
        run(tmp_path / name, tiny_model_dir, tiny_task_dir, steps=2, engine="hf", **options)
    assert_same_run(Outcome(tmp_path / "one", tiny_model_dir), Outcome(tmp_path / "two", tiny_model_dir))


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_two_ranks_with_a_vllm_engine_each(tiny_model_dir, tiny_task_dir, tmp_path):
    """Every sync is verified on every rank, by tensors and by log-probs.

    A mismatch would end the run with an error.
    """
    run(tmp_path / "two", tiny_model_dir, tiny_task_dir, steps=2, engine="vllm", ranks=2, strategy="sharded")
    outcome = Outcome(tmp_path / "two", tiny_model_dir)
    assert [len(step) for step in outcome.rollouts] == [32, 32]
    assert {row["policy_version"] for row in outcome.rollouts[1]} == {1}
    assert 0 < outcome.metrics[1]["sync/logprob_diff_max"] < 1e-3


@pytest.mark.long
def test_two_ranks_validate_what_one_does(tiny_model_dir, tiny_task_dir, tmp_path):
    results = []
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        options = {"kind": "ntp", "steps": 2, "lr": 0.1, "micro_batch_tokens": 64, "validate": True}
        done = run(
            folder,
            tiny_model_dir,
            tiny_task_dir,
            ranks=num_ranks,
            strategy="sharded" if num_ranks > 1 else "auto",
            **options,
        )
        assert done.stdout.count("held-out accuracy of") == 1  # from the first rank alone
        assert "sync_dist" not in done.stderr
        assert [path.name for path in (folder / "validate" / "validation").glob("*.jsonl")] == [
            "step-000002.jsonl"
        ]
        results.append(read_results(folder / "validate" / "validation" / "step-000002.jsonl"))
    one, two = ({row.task_id: row for row in result.positions} for result in results)
    assert len(one) == len(results[0].positions) == len(results[1].positions) == 13
    assert one.keys() == two.keys()
    for task_id, row in one.items():
        assert row.ntp_logprob == pytest.approx(two[task_id].ntp_logprob, abs=1e-3)
    outcomes = [Outcome(tmp_path / str(num_ranks), tiny_model_dir) for num_ranks in (1, 2)]
    assert outcomes[0].distance(outcomes[1]) < 0.01  # a wrong normaliser is off by a factor of 2


ADAPTER = {"adapter": {"rank": 4, "alpha": 8.0}, "ntp_weight": 0.3}


@pytest.mark.long
def test_a_sharded_adapter_is_saved_resumed_and_exported(tiny_model_dir, tiny_task_dir, tmp_path):
    """On one rank. Shards hold the adapter alone, and a resumed run is the same bit for bit."""
    plain, whole, half = tmp_path / "plain", tmp_path / "whole", tmp_path / "half"
    run(plain, tiny_model_dir, tiny_task_dir, steps=4, **ADAPTER)
    run(whole, tiny_model_dir, tiny_task_dir, steps=4, strategy="sharded", **ADAPTER)
    run(half, tiny_model_dir, tiny_task_dir, steps=2, strategy="sharded", **ADAPTER)
    size = sum(file.stat().st_size for file in last_checkpoint(half).iterdir())
    assert size < (tiny_model_dir / "model.safetensors").stat().st_size
    run(half, tiny_model_dir, tiny_task_dir, steps=4, strategy="sharded", resume=True, **ADAPTER)
    undisturbed, resumed = Outcome(whole, tiny_model_dir), Outcome(half, tiny_model_dir)
    assert resumed.distance(undisturbed) == 0
    assert_same_run(Outcome(plain, tiny_model_dir), undisturbed)
    export(str(last_checkpoint(half)), str(tmp_path / "adapter"), form="adapter")
    exported, saved = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        torch.load(last_checkpoint(plain), weights_only=True)["state_dict"],
    )
    assert len(exported) == len(saved)


@pytest.mark.long
def test_an_adapter_is_trained_alike_on_any_number_of_ranks(tiny_model_dir, tiny_task_dir, tmp_path):
    options = {"steps": 4, "optimizer": "SGD", "lr": 0.1, "tasks_per_step": 5} | ADAPTER
    more = {
        "one": {},
        "small": {"micro_batch_tokens": 60},
        "two": {"ranks": 2, "strategy": "sharded", "micro_batch_tokens": 100},
        "ddp": {"ranks": 2, "strategy": "ddp"},
    }
    for name, of_run in more.items():
        run(tmp_path / name, tiny_model_dir, tiny_task_dir, **options, **of_run)
    one, *others = (Outcome(tmp_path / name, tiny_model_dir) for name in more)
    assert (one.end - one.start).norm() > 0
    for other in others:
        assert_same_run(one, other, tolerance=1e-3)
