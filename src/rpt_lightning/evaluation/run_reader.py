"""Read the folder of a run for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rpt_lightning.records.question_results import QuestionResults, read_question_results
from rpt_lightning.records.results import Results, read_results
from rpt_lightning.records.rollout_samples import sample_files
from rpt_lightning.records.run_folder import ANSWER_FOLDER, ROLLOUT_FOLDER, STEP_LOG, VALIDATION_FOLDER
from rpt_lightning.records.step_log import read_step_log


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of one run folder, each part keyed by optimizer step in ascending order.

    The parts are logged metrics, validations at held-out positions, files of rollouts, and answers to
    questions. Any of them may be missing.
    """

    name: str
    steps: dict[int, dict[str, float]]
    validations: dict[int, Results]
    rollouts: dict[int, Path]
    answers: dict[int, QuestionResults] = field(default_factory=dict)

    @property
    def last_validation(self) -> Results | None:
        return list(self.validations.values())[-1] if self.validations else None

    @property
    def last_answers(self) -> QuestionResults | None:
        return list(self.answers.values())[-1] if self.answers else None

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of one metric, for the steps that logged it."""
        logged = {step: metrics[metric] for step, metrics in self.steps.items() if metric in metrics}
        return list(logged), list(logged.values())


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read all folders, in the order given.

    Raises:
        ValueError: There is no folder, one is named twice, one holds nothing to report, or a file is broken.
    """
    if not folders:
        raise ValueError("rpt report needs at least one run folder: rpt report runs/demo/rpt")
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise ValueError(f"{folder}: named twice; a run can only be compared with other runs.")
    return [read_run(folder, name) for folder, name in zip(folders, short_names(resolved), strict=True)]


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read one folder, under its own name unless another is given. Raises as `read_runs` does."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder. Give the value of `trainer.default_root_dir`.")
    log = folder / STEP_LOG
    results = [read_results(path) for path in sorted((folder / VALIDATION_FOLDER).glob("step-*.jsonl"))]
    answers = [read_question_results(path) for path in sorted((folder / ANSWER_FOLDER).glob("step-*.jsonl"))]
    run = Run(
        name=name or folder.name,
        steps=read_step_log(log) if log.is_file() else {},
        validations={
            result.step: result
            for result in sorted(results, key=lambda result: result.step)
            if result.positions
        },
        rollouts=sample_files(folder),
        answers={result.step: result for result in sorted(answers, key=lambda result: result.step)},
    )
    if not (run.steps or run.validations or run.rollouts or run.answers):
        raise ValueError(
            f"{folder}: holds neither {STEP_LOG} nor {VALIDATION_FOLDER}/ nor {ROLLOUT_FOLDER}/ nor "
            f"{ANSWER_FOLDER}/, so there is nothing to report."
        )
    return run


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest path endings that tell the folders apart. None of them is absolute."""
    parts = [folder.parts[1:] if folder.anchor else folder.parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(own) for own in parts]
