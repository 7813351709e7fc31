"""The checks that a run must pass after all its faults.

Each check returns a list of the errors that it found. An empty list means that the run passed.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from memory import Growth
from real_runs import UNEQUAL, differences, traces
from recorded_servers import read_recordings

from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.records.rollout_samples import read_samples

# These metrics depend on the engine: on hits in its cache and on the rounding of its log-probs.
_OF_THE_ENGINE = (
    "rollout/cached_",
    "rollout/shareable_",
    "rollout/prompt_tokens",
    "rollout/prefill_tokens",
    "cost/",
    "sync/",
    "time/",
)


def step_rows(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "steps.jsonl").read_text().splitlines()]


def check_steps(run_folder: Path, num_steps: int) -> list[str]:
    """Check that the log has every step once and in order, and that the last step was saved."""
    found = [row["step"] for row in step_rows(run_folder)]
    wrong = (
        []
        if found == list(range(1, num_steps + 1))
        else [f"the log has {len(found)} steps up to {max(found)}, not each step from 1 to {num_steps} once"]
    )
    newest = max(path.name for path in (run_folder / "checkpoints").glob("step-*.ckpt"))
    return wrong + (
        []
        if newest == f"step-{num_steps:06d}.ckpt"
        else [f"the last checkpoint is {newest}, not of step {num_steps}"]
    )


def check_tasks(
    run_folder: Path, recordings: Path, data: TokenTaskDataModule, *, group_size: int
) -> list[str]:
    """Check that each task in the corpus's order was rolled out in exactly one step.

    No task may be left out or rolled out twice, and every trained task must be among them.
    """
    data.setup("fit")
    asked: dict[int, Counter[str]] = defaultdict(Counter)
    for row in read_recordings(recordings):
        asked[row["version"] + 1][row["task"]] += len(row["samples"])
    return [*_wrong_steps(step_rows(run_folder), run_folder, asked, data, group_size)]


def _wrong_steps(
    rows: Sequence[dict],
    run_folder: Path,
    asked: dict[int, Counter[str]],
    data: TokenTaskDataModule,
    group_size: int,
) -> Iterator[str]:
    for row in rows:
        step = row["step"]
        # Each extra task that dynamic sampling draws replaces one group.
        place = data.stream.next(data.items_per_step + int(row["rollout/replaced_groups"]))
        expected = Counter({data.train.task(document, k).task_id: 0 for document, k in place})
        for document, k in place:
            expected[data.train.task(document, k).task_id] += group_size
        if asked[step] != expected:
            yield f"step {step}: the servers' requests have {_difference(asked[step], expected)}"
        trained = Counter(
            sample.task_id for sample in read_samples(run_folder / "rollouts" / f"step-{step:06d}.jsonl")
        )
        if trained - expected or trained.total() != data.items_per_step * group_size:
            yield f"step {step}: the trained tasks have {_difference(trained, expected)}"


def _difference(found: Counter[str], expected: Counter[str]) -> str:
    return f"{dict(found - expected)} too many and {dict(expected - found)} too few"


def check_replay(run_folder: Path, replay_folder: Path) -> list[str]:
    """Check that the undisturbed run on the same completions gives the same result.

    The weights, the optimizer state and the place in the data must match bit for bit. The metrics must match
    at every step.
    """
    soak, replay = traces(run_folder), traces(replay_folder)
    wrong = []
    for part in ("weights", "optimizer", "place in the data"):
        found = differences(soak[part], replay[part], part)
        wrong += [f"{len(found)} differences in {part}, the first: {found[0]}"] if found else []
    for one, two in zip(soak["steps"], replay["steps"], strict=True):
        names = [
            name
            for name in {*one, *two}
            if not name.startswith((*UNEQUAL, *_OF_THE_ENGINE)) and one.get(name) != two.get(name)
        ]
        if names:
            wrong.append(f"step {one['step']} differs in {sorted(names)}")
            break
    return wrong


def check_memory(growths: Sequence[Growth]) -> list[str]:
    return [
        f"{growth.name}: {growth.first_mib:.0f} to {growth.last_mib:.0f} MiB "
        f"in a life of {growth.life_s:.0f} s"
        for growth in growths
        if not growth.is_flat
    ]


def check_leftovers(run_folder: Path, weights_folder: Path) -> list[str]:
    wrong = [f"{path} is left" for path in (run_folder / "checkpoints").glob("*.partial")]
    return wrong + [f"{path} is left" for path in weights_folder.iterdir()]


def check_restarts(run_folder: Path, num_lives: int) -> list[str]:
    """Check that the run counted its restarts.

    A start that ended before its first checkpoint does not count. Its files were moved aside.
    """
    aside = len(list(run_folder.glob("failed-start-*")))
    restarts = int(step_rows(run_folder)[-1]["run/restarts"])
    # The run cannot count a life that was killed before it wrote its configuration.
    configs = len(list(run_folder.glob("config*.yaml")))
    wrong = (
        []
        if restarts == configs - 1
        else [f"run/restarts is {restarts} with {configs} stored configurations"]
    )
    return wrong + (
        []
        if configs + aside <= num_lives
        else [f"{configs} configurations and {aside} failed starts are more than the {num_lives} starts"]
    )
