r"""The reward for questions with a verifiable answer.

It serves reinforcement fine-tuning after RPT (the paper's RLVR experiment) and the benchmarks.

Format rule: the answer is the content of the last complete ``\boxed{...}`` after the thought
(`extract_prediction`), in a completion that ended by itself. A choice is right if it is the right letter. A
mathematical answer is right if Math-Verify finds it equal to the true answer and it does not just repeat an
expression of the question.
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
"""The outcome of one completion.

``quoted``: it repeats an expression of the question that has the true value. ``unboxed``: it ended without an
answer in the required form. ``truncated``: it ran into the token limit.
"""

METRICS: dict[str, Verdict] = {
    "answers/quoted": "quoted",
    "answers/unreadable": "unreadable",
    "answers/timeouts": "timeout",
    "answers/check_errors": "error",
}

_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.:)](?:\s.*)?)?", re.DOTALL)


def choice_letter(prediction: str) -> str | None:
    r"""Return the letter that a box names, as a capital.

    It may be alone, in parentheses or in a LaTeX font. It may also come before a ``.``, ``:`` or ``)`` and
    the choice's text.

    >>> texts = (" B ", "(c)", r"\text{(D)}", "A. a long text", "B: 4", "4", "AB", "A or B", "")
    >>> [choice_letter(text) for text in texts]
    ['B', 'C', 'D', 'A', 'B', None, None, None, None]
    """
    match = _LETTER.fullmatch(without_fonts(prediction).strip().strip("$").strip())
    return match.group(1).upper() if match else None


class CountingReward(Reward):
    """A reward that depends on a check which may fail, and that counts the failures."""

    @abstractmethod
    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Return counts over the groups of a step that were rewarded, always under the same names.

        Each completion counts once, however often it was rewarded.
        """


class AnswerReward(CountingReward):
    """Reward 1 if the answer is right, else 0.

    An answer that cannot be checked earns 0 and is counted (``answers/unreadable``, ``timeouts``,
    ``check_errors``). An answer that repeats an expression of the question also earns 0 and is counted
    (``answers/quoted``).

    Args:
        cpu_limit_s: CPU seconds that Math-Verify may use for one answer.
        num_workers: Number of processes on each rank that check mathematical answers.
    """

    needs_first_token_probs = False

    def __init__(self, cpu_limit_s: float = 5.0, num_workers: int = 2) -> None:
        self.verifier = MathVerifier(cpu_limit_s, num_workers)
        self.checked_answers: set[str] = set()
        """True answers that have been compared with themselves (training/unlike_answers.py)."""
        # Keyed by (question, prediction), for the current step.
        self._known: dict[tuple[str, bytes | None], Verdict] = {}
        self._lock = threading.Lock()  # rollouts may be rewarded in one thread and logged in another

    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        if not isinstance(task, AnswerTask):
            raise ValueError(
                f"task {task.task_id!r} is not a question: AnswerReward rewards answers of an "
                "AnswerTaskDataModule; give another reward or --data"
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
        """Return the same as ``verdicts``, without repeating checks since the last ``take_metrics``."""
        question_id = task.question.question_id
        known = self._known  # another thread may start a new one in the meantime
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
        """Return the outcome of each prediction. A missing or empty prediction is ``unboxed``."""
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
