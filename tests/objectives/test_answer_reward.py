"""From completions to rewards: the rule for the final box, choice letters, and counts of failed checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ChatPrompt, ContinuationPrompt, QuestionPrompt
from rpt_lightning.objectives.question import QuestionObjective
from rpt_lightning.objectives.question_text import question_text
from rpt_lightning.objectives.rewards.answer import AnswerReward, choice_letter
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.types import (
    AnsweredTask,
    AnswerTask,
    Completion,
    Question,
    RolloutGroup,
    Task,
    TokenTask,
)

SUM = AnswerTask(
    question=Question(question_id="sum", text="1/4 + 1/4?", answer=r"\frac{1}{2}"), context_ids=(1,)
)
CHOICE = AnswerTask(
    question=Question(question_id="choice", text="Which?", answer="C", choices=("1", "2", "3", "4")),
    context_ids=(1,),
)
POSITION = TokenTask(
    task_id="doc:1",
    doc_id="doc",
    position=1,
    context_ids=(1,),
    continuation_ids=(2,),
    continuation=(b"a",),
    entropy=1.0,
    true_prob=0.5,
    true_rank=0,
    answerable=True,
)


@pytest.fixture
def objective(answer_reward: AnswerReward, tiny_tokenizer: Any) -> BoundObjective:
    return QuestionObjective(ContinuationPrompt(), answer_reward).bind(tiny_tokenizer)


def completion(text: str, *, finish_reason: Any = "stop") -> Completion:
    return Completion(
        token_ids=(1,),
        text_bytes=text.encode(),
        rollout_logprobs=(-1.0,),
        policy_version=0,
        finish_reason=finish_reason,
    )


@pytest.mark.parametrize(
    ("text", "paid"),
    [
        (r"hm</think>\boxed{\frac{1}{2}}", 1.0),
        (r"hm</think>It is $\boxed{ 0.5 }$.", 1.0),
        # The last box after the thought counts.
        (r"\boxed{3}</think>not \boxed{3} but \boxed{\dfrac12}", 1.0),
        (r"hm</think>\boxed{\frac12} or rather \boxed{3}", 0.0),
        (r"hm</think>\boxed{\boxed{\frac{1}{2}}}", 1.0),  # nested: the inner box begins last
        (r"hm</think>\boxed{3 \boxed{\frac{1}{2}}}", 1.0),
        (r"\boxed{\frac{1}{2}}", 0.0),  # the thought never ended
        (r"hm</think>\frac{1}{2}", 0.0),  # no box
        (r"hm</think>\boxed{\frac{1}{2}", 0.0),  # the brace of the box is not closed
        (r"hm</think>\boxed{}", 0.0),
        (r"hm</think>\boxed{1}", 0.0),
    ],
)
def test_the_last_box_after_the_thought_is_checked(objective: BoundObjective, text: str, paid: float) -> None:
    assert objective.rewards(answered(SUM, [objective.prediction(completion(text))])) == (paid,)


def test_a_truncated_completion_has_no_answer(objective: BoundObjective) -> None:
    assert objective.rewards(
        answered(SUM, [objective.prediction(completion(r"</think>\boxed{0.5}", finish_reason="length"))])
    ) == (0.0,)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            (text, "C")
            for text in (
                "C",
                " c. ",
                "(C)",
                r"\textbf{(C)}",
                r"\text{\textbf{C}}",
                "$C$",
                "C) three",
                "C: 3\nindeed",
            )
        ),
        *((text, None) for text in ("3", "CD", "C or D", "Cat", "", r"\frac{C}{D}")),
    ],
)
def test_letters_of_choices(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


def answered(task: Task, predictions: Sequence[bytes | None]) -> AnsweredTask:
    completions = tuple(completion("") for _ in predictions)
    return AnsweredTask(task=task, prompt_ids=(1,), completions=completions, predictions=tuple(predictions))


def test_choices_are_paid_by_letter_alone(answer_reward: AnswerReward) -> None:
    assert answer_reward.group_rewards(answered(CHOICE, [b"C", b"(c)", b"3", b"B", b"J", None])) == (
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    )
    assert answer_reward.verdicts(CHOICE, [b"3", b"B", None]) == ["unreadable", "wrong", "unboxed"]


@pytest.mark.parametrize(
    ("question", "answer", "prediction", "verdict"),
    [
        ("What is 29 - 14?", "15", "29-14", "quoted"),
        ("What is $30/2$?", "15", " 30 / 2 ", "quoted"),
        (r"Compute $\dfrac{30}{2}$.", "15", r"\frac{30}{2}", "quoted"),
        (r"Compute $\left(2^4\right)$.", "16", "2^4", "quoted"),
        ("Factor $x^2 + 2x + 1$.", "(x+1)^2", "x^2+2x+1", "quoted"),
        ("What is 29 - 14?", "15", "15", "right"),
        # This is worked out, though not completely. We follow Math-Verify here.
        ("What is 29 - 14?", "15", "30 - 15", "right"),
        ("What is 29 - 14?", "16", "29 - 14", "wrong"),
        # The true answer is in the question.
        (r"Which is larger, $\dfrac{1}{2}$ or $0.4$?", r"\frac{1}{2}", r"\dfrac{1}{2}", "right"),
        ("Which is larger, -3 or -5?", "-3.0", "-3", "right"),  # a sign is not an operation
        (r"An angle of $90^\circ$, or a larger one?", "90", r"90^{\circ}", "right"),
        (r"Is it $2\pi$ or 3?", r"\pi \cdot 2", r"2\pi", "right"),
        # Nothing is left to work out in the following answers. They are in the question, in another form than
        # the true answer.
        ("Which solves it, x=-2 or x=3?", "-2", "x=-2", "right"),
        ("Which solves it, $x = -2$ or $x = 3$?", "x = -2.0", "x=-2", "right"),
        ("Is it (0,-3) or (1,2)?", r"\left(0, \frac{-6}{2}\right)", "(0,-3)", "right"),
        (r"Which is larger, $\frac{3}{4}$ or $\frac{2}{3}$?", "0.75", r"\frac{3}{4}", "right"),
        ("Which is larger, 3/4 or 2/3?", r"\dfrac{3}{4}", "3/4", "right"),
        (r"Is the angle $\frac{\pi}{2}$ or $\pi$?", r"\pi/2", r"\frac{\pi}{2}", "right"),
        (r"Is it $[2, \infty)$ or $x \le 1$?", r"x \ge 2", r"[2,\infty)", "right"),
        (r"Is it $3 \cdot x + 1$ or $x$?", "1+3x", r"3\times x+1", "quoted"),
        # This is the true answer in another notation.
        (r"Is it $x^2 \cdot 3$ or $x$?", r"x^{2}\times 3", r"x^2 \cdot 3", "right"),
        (r"Is it $y = 2x + 1$ or $y = x$?", "2x+1", "y=2x+1", "right"),
        (r"What is $17 \div 5$?", "3.4", r"17\div 5", "quoted"),
        ("What is 12/16?", r"\frac{3}{4}", "12/16", "quoted"),
        (r"Simplify $\sqrt{8}$.", r"2\sqrt{2}", r"\sqrt{8}", "quoted"),
        ("What is x if x = 29 - 14?", "15", "x = 29 - 14", "quoted"),
        ("What is (29-14, 2)?", "(15,2)", "(29-14, 2)", "quoted"),
    ],
)
def test_an_expression_of_the_question_is_no_answer(
    answer_reward: AnswerReward, question: str, answer: str, prediction: str, verdict: str
) -> None:
    task = AnswerTask(question=Question(question_id="q", text=question, answer=answer), context_ids=(1,))
    assert answer_reward.verdicts(task, [prediction.encode()]) == [verdict]
    assert answer_reward.group_rewards(answered(task, [prediction.encode()])) == (float(verdict == "right"),)
    assert answer_reward.take_metrics([group(task, [prediction.encode()])])["answers/quoted"] == (
        verdict == "quoted"
    )


def group(task: AnswerTask, predictions: list[bytes | None]) -> RolloutGroup:
    completions = tuple(completion("") for _ in predictions)
    return RolloutGroup(
        task=task,
        prompt_ids=(1,),
        completions=completions,
        predictions=tuple(predictions),
        rewards=(0.0,) * len(predictions),
    )


def test_what_could_not_be_checked_is_counted_once(answer_reward: AnswerReward) -> None:
    unanswerable = AnswerTask(
        question=replace(SUM.question, question_id="none", answer=" "), context_ids=(1,)
    )
    predictions = {
        SUM: [b"9^{9^{9^9}}", b"\xff?", None, b"0.5"],
        unanswerable: [b"1", b"2"],
        CHOICE: [b"the third", b"C"],
    }
    # Pilots, which are rewarded again with their group.
    assert answer_reward.group_rewards(answered(SUM, predictions[SUM][:2])) == (0.0, 0.0)
    assert answer_reward.group_rewards(answered(SUM, [b"7"])) == (0.0,)  # a trial that no step trains
    paid = {task: answer_reward.group_rewards(answered(task, given)) for task, given in predictions.items()}
    assert list(paid.values()) == [(0.0, 0.0, 0.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
    metrics = answer_reward.take_metrics([group(task, given) for task, given in predictions.items()])
    assert metrics == {
        "answers/quoted": 0.0,
        "answers/timeouts": 1.0,
        "answers/check_errors": 2.0,
        "answers/unreadable": 1.0,
    }
    assert set(answer_reward.take_metrics([]).values()) == {0.0}


def test_prompt_reward_and_task_must_fit(answer_reward: AnswerReward) -> None:
    with pytest.raises(ValueError, match=r"cannot use ChatPrompt.*give the prompt QuestionPrompt"):
        QuestionObjective(ChatPrompt(), answer_reward)
    with pytest.raises(ValueError, match=r"cannot use QuestionPrompt.*give the prompt ChatPrompt"):
        NextTokenObjective(QuestionPrompt(), PrefixMatchReward())
    with pytest.raises(ValueError, match=r"task 'doc:1' is not a question"):
        answer_reward.group_rewards(answered(POSITION, [b"a"]))
    with pytest.raises(ValueError, match=r"task 'sum' is not a position of a text"):
        PrefixMatchReward().group_rewards(answered(SUM, [b"a"]))


def test_a_question_is_the_users_turn(tiny_tokenizer: Any) -> None:
    prompt = QuestionPrompt().bind(tiny_tokenizer)
    question_ids = tuple(tiny_tokenizer.encode(question_text(SUM.question)))
    assert tiny_tokenizer.decode(prompt.prompt_ids(question_ids)) == (
        "<|im_start|>user\n1/4 + 1/4?\n\n"
        "Please reason step by step, and put your final answer within \\boxed{}.\n"
        "<|im_end|>\n<|im_start|>assistant\n<think>"
    )
