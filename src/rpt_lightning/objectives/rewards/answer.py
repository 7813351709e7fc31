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
from collections import Counter
from collections.abc import Sequence

from rpt_lightning.objectives.math.quoted_answer import quotes_question, without_fonts
from rpt_lightning.objectives.math.true_answers import unlike_answer_remarks
from rpt_lightning.objectives.math.verifier import MathVerifier
from rpt_lightning.objectives.rewards.next_token import Reward
from rpt_lightning.types import AnsweredTask, AnswerTask, Outcome, Question, RolloutGroup, Task

METRICS: dict[str, Outcome] = {
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


def answer_task(task: Task) -> AnswerTask:
    """Return the task as a question. Raises ValueError if it is not one."""
    if not isinstance(task, AnswerTask):
        raise ValueError(
            f"task {task.task_id!r} is not a question, as AnswerReward needs; give --data "
            "AnswerTaskDataModule, or --rollout.objective NextTokenObjective"
        )
    return task


class AnswerReward(Reward):
    """Reward 1 if the answer is right, else 0.

    An answer that cannot be checked earns 0 and is counted (``answers/unreadable``, ``timeouts``,
    ``check_errors``). An answer that repeats an expression of the question also earns 0 and is counted
    (``answers/quoted``).

    Args:
        cpu_limit_s: CPU seconds that Math-Verify may use for one answer.
        num_workers: Number of processes on each rank that check mathematical answers.
    """

    def __init__(self, cpu_limit_s: float = 5.0, num_workers: int = 2) -> None:
        self.verifier = MathVerifier(cpu_limit_s, num_workers)
        self._compared: set[str] = set()  # true answers that have been compared with themselves
        # Keyed by (question, prediction), for the current step.
        self._known: dict[tuple[str, bytes | None], Outcome] = {}
        self._lock = threading.Lock()  # rollouts may be rewarded in one thread and logged in another

    def group_rewards(self, answered: AnsweredTask) -> tuple[float, ...]:
        verdicts = self._known_verdicts(answer_task(answered.task), answered.predictions)
        return tuple(float(verdict == "right") for verdict in verdicts)

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Return how many completions of a step had each failure. Each counts once."""
        counts = Counter(
            verdict
            for group in groups
            for verdict in self._known_verdicts(answer_task(group.task), group.predictions)
        )
        with self._lock:
            self._known = {}
        return {name: float(counts[verdict]) for name, verdict in METRICS.items()}

    def unlike_answers(self, questions: Sequence[Question]) -> list[str]:
        """Count and name the questions whose true answer does not equal itself in another notation.

        A true answer that was compared before is left out.
        """
        asked = [
            question
            for question in questions
            if not question.is_choice and question.answer not in self._compared
        ]
        self._compared |= {question.answer for question in asked}
        return unlike_answer_remarks(asked, self.verifier)

    def _known_verdicts(self, task: AnswerTask, predictions: Sequence[bytes | None]) -> list[Outcome]:
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

    def verdicts(self, task: AnswerTask, predictions: Sequence[bytes | None]) -> list[Outcome]:
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
        found: dict[str, Outcome] = dict(
            zip(asked, self.verifier.verdicts([(question.answer, text) for text in asked]), strict=True)
        )
        quoted = {
            text for text, verdict in found.items() if verdict == "right" and quotes_question(text, question)
        }
        return ["quoted" if text in quoted else found.get(text, "unboxed") for text in texts]
