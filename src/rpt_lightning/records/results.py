"""Records of a validation: one for each held-out position.

They are written as a JSONL file, and beside it stands a JSON file that describes the policy. Results are kept
for each position so that any two policies can be compared in pairs, long after both runs have ended.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rpt_lightning.metrics.token_kind import TokenKind
from rpt_lightning.policy.flops import ModelSize
from rpt_lightning.records.record_file import read_about, read_lines, write_about, write_lines
from rpt_lightning.records.record_types import check_types
from rpt_lightning.types import Fields


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionResult:
    """The results of one policy at one position.

    ``ntp_correct`` tells whether the greedy next token without reasoning was right, at the same position and
    with the same weights. ``ntp_logprob`` (nats) is what they gave the true token. ``length`` counts the
    completion's tokens, and ``thought_length`` those before the end of the thought (None: it never ended).

    The thought controls are the answers forced after an empty thought, after the thought of another
    document's position, and after filler as long as the position's own thought. A control is None if it was
    not run or could not be run at this position.

    Of ``num_samples`` further completions, drawn at the evaluation's temperature, ``num_correct`` were right.
    Together they have ``sampled_tokens``. ``context_tokens`` is what the policy read without reasoning, and
    ``prompt_tokens`` is what it read with reasoning. ``token_kind`` is the kind of the true token
    (metrics/token_kind.py). ``fields`` holds what the corpus knows about the position, or None.

    In files of earlier versions, ``token_kind`` and all fields after it may be missing. They are then None.


    >>> result = PositionResult(
    ...     task_id="doc-7:4", doc_id="doc-7", position=4, entropy=1.2, answerable=True, truth=" 4",
    ...     prediction=" 4", reasoning_correct=True, ntp_correct=False, ntp_logprob=-1.17, boxed=True,
    ...     truncated=False, length=9,
    ... )
    >>> result.empty_thought_correct is None
    True
    """

    task_id: str
    doc_id: str
    position: int
    entropy: float
    answerable: bool
    truth: str
    ntp_correct: bool
    ntp_logprob: float
    prediction: str | None = None
    reasoning_correct: bool | None = None
    boxed: bool | None = None
    truncated: bool | None = None
    length: int | None = None
    empty_thought_correct: bool | None = None
    shuffled_thought_correct: bool | None = None
    token_kind: TokenKind | None = None
    context_tokens: int | None = None
    prompt_tokens: int | None = None
    thought_length: int | None = None
    num_samples: int | None = None
    num_correct: int | None = None
    sampled_tokens: int | None = None
    filler_thought_correct: bool | None = None
    fields: Fields | None = dataclasses.field(default=None, hash=False)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All positions of one evaluation, and the weights that were evaluated.

    The weights are those of ``policy_path`` after ``step`` optimizer steps. ``ckpt_path`` is the checkpoint
    they were read from. It is None for the weights of ``policy_path`` itself and for a run that validates
    during training. ``model_size`` is the policy's, and ``temperature`` is that of the sampled completions.
    Both are None if unknown, as in files of earlier versions.
    """

    positions: tuple[PositionResult, ...]
    policy_path: str
    step: int
    ckpt_path: str | None = None
    model_size: ModelSize | None = None
    temperature: float | None = None


def write_results(results: Results, path: Path) -> None:
    """Write ``path`` (one position for each line) and then the JSON file beside it.

    The JSON file is ``path`` with the suffix ``.json``. Without it the lines are not trusted.
    """
    write_lines(map(asdict, results.positions), path)
    about = {
        "policy_path": results.policy_path,
        "ckpt_path": results.ckpt_path,
        "step": results.step,
        "num_positions": len(results.positions),
        "model_size": None if results.model_size is None else asdict(results.model_size),
        "temperature": results.temperature,
    }
    write_about(about, path)


def read_results(path: Path) -> Results:
    """Read files that ``write_results`` wrote.

    Raises:
        ValueError: A file is missing or broken, or there are fewer lines than the JSON file says (an
            evaluation that was interrupted).
    """
    about = read_about(path, command="rpt validate", needed=("policy_path", "step", "num_positions"))
    positions = tuple(read_lines(path, _parse_line))
    if len(positions) != about["num_positions"]:
        says = f"{path.with_suffix('.json').name} says {about['num_positions']}"
        raise ValueError(f"{path}: {len(positions)} positions, but {says}. Run `rpt validate` again.")
    check_types(about, Results, str(path.with_suffix(".json")))
    size = about.get("model_size")
    try:
        model_size = None if size is None else ModelSize(**size)
    except TypeError as error:
        raise ValueError(
            f"{path.with_suffix('.json')}: model_size {size!r} does not describe a model ({error}). "
            "Run `rpt validate` again."
        ) from error
    return Results(
        positions=positions,
        policy_path=about["policy_path"],
        step=about["step"],
        ckpt_path=about.get("ckpt_path"),
        model_size=model_size,
        temperature=about.get("temperature"),
    )


def pair_results(first: Results, second: Results) -> list[tuple[PositionResult, PositionResult]]:
    """Pair the positions of two policies, in the order of ``first``.

    Raises:
        ValueError: The two do not hold exactly the same positions with the same truth.
    """
    by_task = {position.task_id: position for position in second.positions}
    tasks = {position.task_id for position in first.positions}
    if len(tasks) != len(first.positions) or len(by_task) != len(second.positions):
        raise ValueError(
            f"Results of {first.policy_path} or {second.policy_path}: a position occurs twice, so they "
            "cannot be paired."
        )
    if unpaired := sorted(tasks ^ by_task.keys()):
        raise ValueError(
            f"Results of {first.policy_path} ({len(tasks)} positions) and {second.policy_path} "
            f"({len(by_task)}) are of different positions, for example {unpaired[0]!r}. Validate both with "
            "the same task folder and the same number of positions."
        )
    pairs = [(position, by_task[position.task_id]) for position in first.positions]
    for one, other in pairs:
        if one.truth != other.truth:
            raise ValueError(
                f"Position {one.task_id!r} has the truth {one.truth!r} in one result and {other.truth!r} in "
                "the other."
            )
    return pairs


def _parse_line(line: str, where: str) -> PositionResult:
    try:
        result = PositionResult(**json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(PositionResult))
        raise ValueError(
            f"{where}: not a position result ({error}). Expected one JSON object with {names}."
        ) from error
    check_types(asdict(result), PositionResult, where)
    return result
