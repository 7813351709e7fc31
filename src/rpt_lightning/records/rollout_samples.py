"""Records of training rollouts: one for each completion, in ``rollouts/step-N.jsonl`` in a run's folder.

This module defines the format for both the writer and the reader.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpt_lightning.objectives.box import BOX_OPEN
from rpt_lightning.records.record_file import read_lines, write_lines
from rpt_lightning.records.record_types import check_types
from rpt_lightning.records.run_folder import ROLLOUT_FOLDER
from rpt_lightning.types import FinishReason, RolloutGroup

if TYPE_CHECKING:
    from rpt_lightning.pretrained.token_bytes import TokenBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSample:
    """One completion of the policy at a training position, and its reward.

    Bytes that do not form a character become replacement characters.

    ``context`` is the end of the text before the position. ``truth`` is the true continuation, token by
    token. ``thought`` is the text before the last box, or the whole text if there is no box. ``tokens`` are
    the completion's tokens as text (see `text_pieces`), including the stop token. ``logprobs`` are the
    engine's (nats, after the temperature). ``entropy`` is the proxy's, in nats. For a question, ``truth`` is
    its answer and there is no entropy. Fields that are missing in files of earlier versions are None.

    >>> sample = RolloutSample(
    ...     task_id="doc-7:4", context="2 + 2 =", truth=(" 4", "."), thought="hm</think>",
    ...     completion="hm</think>\\\\boxed{ 4}", prediction=" 4", reward=1.0, finish_reason="stop",
    ...     policy_version=3,
    ... )
    >>> sample.tokens is None
    True
    """

    task_id: str
    context: str
    truth: tuple[str, ...]
    thought: str
    completion: str
    prediction: str | None
    reward: float
    finish_reason: FinishReason
    policy_version: int
    tokens: tuple[str, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    entropy: float | None = None

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


def text_pieces(tokens: Iterable[bytes]) -> tuple[str, ...]:
    """Split the text into the shares of its tokens.

    A character belongs to the token that completes it, so a token that ends inside one may be empty.

    Joined, the pieces are the decoded text of all the tokens' bytes.

    >>> text_pieces([b"caf", b"\\xc3", b"\\xa9!"])
    ('caf', '', 'é!')
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = [decoder.decode(token) for token in tokens]
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return tuple(pieces)


def samples_of(group: RolloutGroup, *, context: str, token_bytes: TokenBytes) -> list[RolloutSample]:
    """Make one sample for each completion, in the group's order."""
    return [
        RolloutSample(
            task_id=group.task.task_id,
            context=context,
            truth=text_pieces(group.truth),
            thought=_thought(completion.text_bytes).decode(errors="replace"),
            completion=completion.text_bytes.decode(errors="replace"),
            prediction=None if prediction is None else prediction.decode(errors="replace"),
            reward=reward,
            finish_reason=completion.finish_reason,
            policy_version=completion.policy_version,
            tokens=text_pieces(token_bytes.drawn(token_id) for token_id in completion.token_ids),
            logprobs=tuple(round(logprob, 3) for logprob in completion.rollout_logprobs),
            entropy=None if group.task.entropy is None else round(group.task.entropy, 4),
        )
        for completion, prediction, reward in zip(
            group.completions, group.predictions, group.rewards, strict=True
        )
    ]


def write_samples(samples: Iterable[RolloutSample], path: Path) -> None:
    """Write one line for each sample, and make the folder if it is missing."""
    names = [field.name for field in fields(RolloutSample)]
    # asdict would copy every token, which takes seconds at a step of the paper's size.
    write_lines(({name: getattr(sample, name) for name in names} for sample in samples), path)


def read_samples(path: Path) -> list[RolloutSample]:
    """Read a file that ``write_samples`` of this or an earlier version wrote.

    Raises:
        ValueError: A line is broken or lacks a field that every version wrote.
    """
    return read_lines(path, _parse_line)


def _parse_line(line: str, where: str) -> RolloutSample:
    try:
        row = json.loads(line)
        known: dict[str, Any] = {
            field.name: row[field.name]
            for field in fields(RolloutSample)
            if field.name in row or field.default is MISSING
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        needed = ", ".join(field.name for field in fields(RolloutSample) if field.default is MISSING)
        raise ValueError(
            f"{where}: not a rollout ({error!r}). Expected one JSON object with {needed}."
        ) from error
    check_types(known, RolloutSample, where)
    known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return RolloutSample(**known)


def _thought(text: bytes) -> bytes:
    thought, box, rest = text.rpartition(BOX_OPEN)
    return thought if box else rest


def sample_files(run_dir: Path) -> dict[int, Path]:
    """Return the files of a run by optimizer step, in ascending order."""
    files = {
        int(path.stem.removeprefix("step-")): path for path in (run_dir / ROLLOUT_FOLDER).glob("step-*.jsonl")
    }
    return dict(sorted(files.items()))
