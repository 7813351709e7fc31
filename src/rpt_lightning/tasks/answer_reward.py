r"""The reward of questions with a verifiable answer: reinforcement fine-tuning after RPT (the paper's experiment on RLVR), and the benchmarks.

Format rule: the answer is the content of the complete ``\boxed{...}`` that begins last, after the thought (`extract_prediction`), of a completion that ended
by itself. A mathematical answer is right if Math-Verify says that it equals the true one, a choice if it is the right letter.
"""

from __future__ import annotations

import re
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from rpt_lightning.tasks.math_verifier import MathVerdict, MathVerifier
from rpt_lightning.tasks.reward import Reward
from rpt_lightning.types import AnswerTask, Task

Verdict = MathVerdict | Literal["unboxed", "truncated"]
"""What became of one completion. ``unboxed``: it ended without an answer in the asked form. ``truncated``: it ran into the token limit."""

METRICS: dict[str, Verdict] = {"answers/unreadable": "unreadable", "answers/timeouts": "timeout", "answers/check_errors": "error"}

_MACRO = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathsf|boldsymbol)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.:)](?:\s.*)?)?", re.DOTALL)


def choice_letter(prediction: str) -> str | None:
    r"""The letter that a box names, as a capital: alone, in parentheses, in a LaTeX font, or before a ``.``, ``:`` or ``)`` and the choice's text.

    >>> [choice_letter(text) for text in (" B ", "(c)", r"\text{(D)}", "A. a long text", "B: 4", "4", "AB", "A or B", "")]
    ['B', 'C', 'D', 'A', 'B', None, None, None, None]
    """
    text = prediction
    while (plain := _MACRO.sub(r"\1", text)) != text:
        text = plain
    match = _LETTER.fullmatch(text.strip().strip("$").strip())
    return match.group(1).upper() if match else None


class CountingReward(Reward):
    """A reward that asks something which may fail, and says how often it did."""

    @abstractmethod
    def take_metrics(self) -> dict[str, float]:
        """Counts since they were last taken, always under the same names."""


class AnswerReward(CountingReward):
    """1 if the answer is right, else 0; what cannot be checked is paid 0 and counted (``answers/unreadable``, ``timeouts``, ``check_errors``).

    Args:
        cpu_limit_s: Seconds of CPU that Math-Verify may take for one answer.
        num_workers: Processes of each rank that check mathematical answers.
    """

    needs_first_token_probs = False

    def __init__(self, cpu_limit_s: float = 5.0, num_workers: int = 2) -> None:
        self.verifier = MathVerifier(cpu_limit_s, num_workers)
        self._counts: Counter[Verdict] = Counter()
        self._lock = threading.Lock()  # rollouts may be paid in another thread than the one that logs

    def group_rewards(self, predictions: Sequence[bytes | None], task: Task, first_token_probs: Sequence[float] | None = None) -> tuple[float, ...]:
        if not isinstance(task, AnswerTask):
            raise ValueError(
                f"task {task.task_id!r} is no question: AnswerReward pays for answers of an AnswerTaskDataModule; give another reward or --data"
            )
        verdicts = self.verdicts(task, predictions)
        with self._lock:
            self._counts.update(verdicts)
        return tuple(float(verdict == "right") for verdict in verdicts)

    def take_metrics(self) -> dict[str, float]:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return {name: float(counts[verdict]) for name, verdict in METRICS.items()}

    def verdicts(self, task: AnswerTask, predictions: Sequence[bytes | None]) -> list[Verdict]:
        """What became of each prediction; a missing one is ``unboxed``, and so is an empty one."""
        texts = [(prediction or b"").decode(errors="replace") for prediction in predictions]
        question = task.question
        if question.is_choice:
            letters = {text: choice_letter(text) for text in texts}
            return [
                "unboxed" if not text.strip() else "unreadable" if letters[text] is None else "right" if letters[text] == question.answer else "wrong"
                for text in texts
            ]
        asked = [text for text in texts if text.strip()]
        found = dict(zip(asked, self.verifier.verdicts([(question.answer, text) for text in asked]), strict=True))
        return [found.get(text, "unboxed") for text in texts]
