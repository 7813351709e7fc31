r"""The reward of questions with a verifiable answer: reinforcement fine-tuning after RPT (the paper's experiment on RLVR), and the benchmarks.

Format rule: the answer is the content of the complete ``\boxed{...}`` that begins last, after the thought (`extract_prediction`), of a completion that ended
by itself. A mathematical answer is right if Math-Verify says that it equals the true one and it is no expression of the question's own, a choice if it is
the right letter.
"""

from __future__ import annotations

import re
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from rpt_lightning.tasks.math_verifier import MathVerdict, MathVerifier
from rpt_lightning.tasks.quoted_answer import quotes_question, without_fonts
from rpt_lightning.tasks.reward import Reward
from rpt_lightning.types import AnswerTask, RolloutGroup, Task

Verdict = MathVerdict | Literal["quoted", "unboxed", "truncated"]
"""What became of one completion. ``quoted``: it repeats an expression of the question that has the true value. ``unboxed``: it ended without an answer in
the asked form. ``truncated``: it ran into the token limit."""

METRICS: dict[str, Verdict] = {
    "answers/quoted": "quoted",
    "answers/unreadable": "unreadable",
    "answers/timeouts": "timeout",
    "answers/check_errors": "error",
}

_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.:)](?:\s.*)?)?", re.DOTALL)


def choice_letter(prediction: str) -> str | None:
    r"""The letter that a box names, as a capital: alone, in parentheses, in a LaTeX font, or before a ``.``, ``:`` or ``)`` and the choice's text.

    >>> [choice_letter(text) for text in (" B ", "(c)", r"\text{(D)}", "A. a long text", "B: 4", "4", "AB", "A or B", "")]
    ['B', 'C', 'D', 'A', 'B', None, None, None, None]
    """
    match = _LETTER.fullmatch(without_fonts(prediction).strip().strip("$").strip())
    return match.group(1).upper() if match else None


class CountingReward(Reward):
    """A reward that asks something which may fail, and says how often it did."""

    @abstractmethod
    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Counts over a step's groups, which it has paid, always under the same names. Each completion counts once, however often it was paid."""


class AnswerReward(CountingReward):
    """1 if the answer is right, else 0; what cannot be checked is paid 0 and counted (``answers/unreadable``, ``timeouts``, ``check_errors``), and so is an
    expression of the question (``answers/quoted``).

    Args:
        cpu_limit_s: Seconds of CPU that Math-Verify may take for one answer.
        num_workers: Processes of each rank that check mathematical answers.
    """

    needs_first_token_probs = False

    def __init__(self, cpu_limit_s: float = 5.0, num_workers: int = 2) -> None:
        self.verifier = MathVerifier(cpu_limit_s, num_workers)
        self.checked_answers: set[str] = set()
        """True answers that were compared with themselves (training/unlike_answers.py)."""
        self._known: dict[
            tuple[str, bytes | None], Verdict
        ] = {}  # (question, prediction), of the step that runs
        self._lock = threading.Lock()  # rollouts may be paid in another thread than the one that logs

    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        if not isinstance(task, AnswerTask):
            raise ValueError(
                f"task {task.task_id!r} is no question: AnswerReward pays for answers of an AnswerTaskDataModule; give another reward or --data"
            )
        return tuple(float(verdict == "right") for verdict in self._known_verdicts(task, predictions))

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        counts = Counter(
            verdict
            for group in groups
            if isinstance(group.task, AnswerTask)
            for verdict in self._known_verdicts(group.task, group.predictions)
        )
        with self._lock:
            self._known = {}
        return {name: float(counts[verdict]) for name, verdict in METRICS.items()}

    def _known_verdicts(self, task: AnswerTask, predictions: Sequence[bytes | None]) -> list[Verdict]:
        """As ``verdicts``; what was checked since the last ``take_metrics`` is not checked again."""
        question_id = task.question.question_id
        known = self._known  # another thread may begin a new one meanwhile
        new = [
            prediction for prediction in dict.fromkeys(predictions) if (question_id, prediction) not in known
        ]
        found = {
            (question_id, prediction): verdict
            for prediction, verdict in zip(new, self.verdicts(task, new), strict=True)
        }
        with self._lock:
            self._known |= found
        return [
            (found if (question_id, prediction) in found else known)[question_id, prediction]
            for prediction in predictions
        ]

    def verdicts(self, task: AnswerTask, predictions: Sequence[bytes | None]) -> list[Verdict]:
        """What became of each prediction; a missing one is ``unboxed``, and so is an empty one."""
        texts = [(prediction or b"").decode(errors="replace") for prediction in predictions]
        question = task.question
        if question.is_choice:
            letters = {text: choice_letter(text) for text in texts}
            return [
                "unboxed"
                if not text.strip()
                else "unreadable"
                if letters[text] is None
                else "right"
                if letters[text] == question.answer
                else "wrong"
                for text in texts
            ]
        asked = [text for text in texts if text.strip()]
        found: dict[str, Verdict] = dict(
            zip(asked, self.verifier.verdicts([(question.answer, text) for text in asked]), strict=True)
        )
        quoted = {
            text for text, verdict in found.items() if verdict == "right" and quotes_question(text, question)
        }
        return ["quoted" if text in quoted else found.get(text, "unboxed") for text in texts]
