"""Rollouts in the form that the page holds: one compressed block for each step.

The browser decompresses a block when its step is shown.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from rpt_lightning.records.rollout_samples import RolloutSample

RIGHT, WRONG, TRUNCATED = 0, 1, 2
IMPOSSIBLE = 5000  # hundredths of a nat: 0.0 %


def spread(steps: Sequence[int], number: int) -> list[int]:
    """Choose ``number`` of the steps (2 or more), evenly spread, including the first and the last.

    Returns all steps if there are no more than ``number``.

    >>> spread([1, 11, 21, 31, 41], 3)
    [1, 21, 41]
    """
    if len(steps) <= number:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (number - 1))] for index in range(number)]


def outcome(sample: RolloutSample) -> int:
    """Classify a sample.

    Right means the full reward, because a dense reward gives less than 1 for a wrong first token.
    """
    return TRUNCATED if sample.is_truncated else RIGHT if sample.reward >= 1 else WRONG


def step_data(samples: Sequence[RolloutSample]) -> dict[str, Any]:
    """Encode the samples of a step.

    Keys are short because each occurs once for every completion. rollout_view.js explains them.
    """
    tasks = []
    for task_id, group in itertools.groupby(samples, key=lambda sample: sample.task_id):
        rows = list(group)
        tasks.append(
            {
                "id": task_id,
                "c": rows[0].context,
                "t": rows[0].truth,
                "e": rows[0].entropy,
                "r": [_completion(row) for row in rows],
            }
        )
    return {"tasks": tasks}


def compress(text: str) -> str:
    """Compress text with gzip and encode it as base64, which cannot end a script element.

    The same text always gives the same characters.
    """
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def compress_json(data: object) -> str:
    """Compress compact JSON with `compress`."""
    return compress(json.dumps(data, ensure_ascii=False, separators=(",", ":")))


def _completion(sample: RolloutSample) -> dict[str, Any]:
    completion: dict[str, Any] = {
        "o": outcome(sample),
        "p": sample.prediction,
        "w": sample.reward,
        "v": sample.policy_version,
    }
    if sample.tokens is None:
        return completion | {"h": sample.thought, "a": sample.completion[len(sample.thought) :]}
    logprobs = None if sample.logprobs is None else [_hundredths(logprob) for logprob in sample.logprobs]
    return completion | {
        "k": sample.tokens,
        "l": logprobs,
        "n": num_thought_tokens(sample.tokens, sample.thought),
    }


def _hundredths(logprob: float) -> int:
    """Convert a log-prob to hundredths of a nat, with the sign reversed.

    A value that is not finite (a server says NaN for -inf) counts as impossible.
    """
    return round(-100 * logprob) if math.isfinite(logprob) else IMPOSSIBLE


def num_thought_tokens(tokens: Sequence[str], thought: str) -> int:
    """Count the tokens that lie in the thought. A token that reaches into the answer belongs to the answer.

    >>> num_thought_tokens(["a", "b</", "think> \\\\", "boxed{x}"], "ab</think> ")
    2
    """
    ends = itertools.accumulate(len(token) for token in tokens)
    return sum(end <= len(thought) for end in ends)
