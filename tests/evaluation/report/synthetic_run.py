"""Make a run's folder with invented numbers, for tests of the report. Nothing in it was measured."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from rpt_lightning.records.results import PositionResult, Results, write_results
from rpt_lightning.records.rollout_samples import RolloutSample, write_samples

WORDS = [
    "either",
    " a",
    " sum",
    " wait,",
    " probably",
    " the",
    " root",
    " of",
    " =",
    " x",
    "\n",
    " finally",
    " é",
    " 4",
    " ⟨",
    "+",
]
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>window.harmed=1</script>",
    '<img src="x" onerror="window.harmed=1">',
    "<!--<script>",
    "]]>&lt;b&amp;",
    "\u2028 ${x} `y` \\u003c {{ 7*7 }}",
)


def write_run(
    folder: Path,
    *,
    num_steps: int = 40,
    sampled_steps: tuple[int, ...] = (1, 21),
    num_tasks: int = 8,
    group_size: int = 4,
    num_documents: int = 60,
    accuracies: tuple[float, ...] = (0.25, 0.42),
    ntp_accuracy: float = 0.35,
    hostile: bool = False,
    seed: int = 0,
) -> None:
    """Write the folder.

    ``accuracies`` are the expected reasoning accuracies of validations, spread evenly over the steps from 0
    on. Each document has 5 positions.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_log(folder / "steps.jsonl", num_steps, draw)
    for index, accuracy in enumerate(accuracies):
        step = index * num_steps // max(1, len(accuracies) - 1)
        write_results(
            results(accuracy, ntp_accuracy, num_documents, step, seed),
            folder / "validation" / f"step-{step:06d}.jsonl",
        )
    for step in sampled_steps:
        share = 0.2 + 0.5 * step / max(1, num_steps)
        texts = HOSTILE if hostile else ()
        write_samples(
            samples(num_tasks, group_size, share, step, texts, draw),
            folder / "rollouts" / f"step-{step:06d}.jsonl",
        )


def write_log(path: Path, num_steps: int, draw: random.Random) -> None:
    lines = []
    for step in range(1, num_steps + 1):
        progress = 1 - math.exp(-step / 25)
        phases = {
            "time/rollout_s": draw.uniform(18, 24),
            "time/train_s": draw.uniform(20, 25),
            "time/sync_s": draw.uniform(0.4, 0.7),
        }
        entry = {
            "step": step,
            "time": 1.7e9 + 45 * step,
            "reward/mean": 0.15 + 0.2 * progress + draw.gauss(0, 0.03),
            "rollout/length_mean": 24 - 8 * progress + draw.gauss(0, 1),
            "policy/entropy": 1.4 - 0.7 * progress + draw.gauss(0, 0.05),
            "rollout/live_groups_frac": 0.6 - 0.25 * progress + draw.gauss(0, 0.04),
            "sync/logprob_diff_mean": 0.004 * math.exp(draw.gauss(0, 0.3)),
            "sync/logprob_diff_max": 0.09 * math.exp(draw.gauss(0, 0.5)),
            "rollout/tokens": 3500.0,
            "train/packed_tokens": 2800.0,
            **phases,
            "time/step_s": sum(phases.values()) + draw.uniform(0.5, 1.5),
        }
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines))


def results(accuracy: float, ntp_accuracy: float, num_documents: int, step: int, seed: int) -> Results:
    draw = random.Random(f"{seed} {step}")
    positions = []
    for document in range(num_documents):
        for position in range(5):
            entropy = random.Random(f"{document} {position}").uniform(0.5, 2.5)
            harder = 1.15 - 0.2 * entropy
            positions.append(
                PositionResult(
                    task_id=f"doc-{document}:{position}",
                    doc_id=f"doc-{document}",
                    position=position,
                    entropy=entropy,
                    answerable=(document + position) % 37 != 0,
                    truth=" 4",
                    prediction=" 4",
                    reasoning_correct=draw.random() < accuracy * harder,
                    ntp_correct=draw.random() < ntp_accuracy * harder,
                    ntp_logprob=-draw.uniform(0.2, 3),
                    boxed=True,
                    truncated=False,
                    length=draw.randint(8, 30),
                    empty_thought_correct=draw.random() < ntp_accuracy * harder,
                    shuffled_thought_correct=draw.random() < 0.2 * harder,
                    fields={"depth": 1 + document % 4},
                )
            )
    return Results(positions=tuple(positions), policy_path="models/synthetic", step=step)


def samples(
    num_tasks: int,
    group_size: int,
    share_right: float,
    step: int,
    hostile: tuple[str, ...],
    draw: random.Random,
) -> list[RolloutSample]:
    rows = []
    for task in range(num_tasks):
        context = f"Document {task}. Return the sum of the two roots of the polynomial" + "".join(
            draw.choices(WORDS, k=40)
        )
        truth = tuple(draw.choices(WORDS, k=6))
        for index in range(group_size):
            kind = "length" if draw.random() < 0.1 else "stop"
            is_right = kind == "stop" and draw.random() < share_right
            prediction = truth[0] if is_right else "?"
            thought = (
                [hostile[(task + index) % len(hostile)], *draw.choices(WORDS, k=3)]
                if hostile
                else draw.choices(WORDS, k=draw.randint(6, 22))
            )
            tokens = [*thought, "</think>", "\\boxed{", prediction, "}"] if kind == "stop" else thought
            completion = "".join(tokens)
            tokens = [*tokens, "<|end|>"] if kind == "stop" else tokens
            rows.append(
                RolloutSample(
                    task_id=f"doc-{task}:{len(context)}" + (hostile[task % len(hostile)] if hostile else ""),
                    context=(hostile[task % len(hostile)] if hostile else "") + context,
                    truth=truth,
                    thought="".join([*thought, "</think>"]) if kind == "stop" else completion,
                    completion=completion,
                    prediction=prediction if kind == "stop" else None,
                    reward=float(is_right),
                    finish_reason="stop" if kind == "stop" else "length",
                    policy_version=step - 1,
                    tokens=tuple(tokens),
                    logprobs=tuple(round(-draw.expovariate(1.2), 3) for _ in tokens),
                    entropy=round(draw.uniform(0.5, 2.5), 3),
                )
            )
    return rows
