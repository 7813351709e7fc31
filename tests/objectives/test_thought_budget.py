from __future__ import annotations

import dataclasses

import pytest
import toy_tokenizers as toys
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.objectives.information_gain import InformationGainObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import (
    ChatPrompt,
    ContinuationPrompt,
    PromptTemplate,
    QuestionPrompt,
)
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.objectives.thought_budget import ThoughtBudget, length_reward
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import AnsweredTask, AnswerTask, Completion, Question, RolloutGroup, TokenTask

TASK = TokenTask(
    task_id="doc:2", doc_id="doc", position=2, context_ids=(40, 41), continuation_ids=(42,),
    continuation=(b" 4",), entropy=1.0, true_prob=0.5, true_rank=0, answerable=True,
)  # fmt: skip


def completion(length, finish_reason="stop"):
    return Completion(
        token_ids=(1,) * length, text_bytes=b"", rollout_logprobs=(0.0,) * length, policy_version=0,
        finish_reason=finish_reason,
    )  # fmt: skip


def bound(budget, tokenizer=None, prompt=None):
    objective = NextTokenObjective(prompt or ContinuationPrompt(), PrefixMatchReward())
    return objective.bind(tokenizer or toys.byte_level(), budget)


# The schedule and the length term, worked by hand


def test_the_papers_schedule():
    # 800 * 0.2^(t/1000): 0.2^0.1 = 0.85133, 0.2^0.5 = 0.44721, 0.2^0.9 = 0.23493
    budget = ThoughtBudget(initial=800, steps=1000)
    assert [budget.at(step) for step in (0, 100, 500, 900, 999, 1000)] == [800, 681, 357, 187, 160, 160]
    assert budget.at(5000) == 160  # the run goes on, the schedule has ended
    assert budget.of_heldout == 160
    assert ThoughtBudget(initial=800, steps=1000, heldout=300).of_heldout == 300


def test_halves_and_the_least_budget():
    budget = ThoughtBudget(initial=100, steps=4, decay=0.0625, least=20)  # 0.0625 = 1/16: halved every step
    assert [budget.at(step) for step in range(5)] == [100, 50, 25, 20, 20]
    assert budget.values == [20, 25, 50, 100]


def test_a_whole_number_is_not_rounded_down():
    # In floating point 1000 * 0.1 ** (1 / 3) and the like may end just below a whole number.
    budget = ThoughtBudget(initial=1000, steps=3, decay=0.001)
    assert [budget.at(step) for step in range(4)] == [1000, 100, 10, 1]


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (20, 0.5), (40, 1.0), (60, 0.5), (80, 0.0), (81, 0.0), (4000, 0.0)]
)
def test_the_length_term(length, expected):
    assert length_reward(length, 40) == expected


@given(st.integers(1, 500), st.integers(0, 1500))
def test_the_length_term_is_a_symmetric_tent(budget, length):
    value = length_reward(length, budget)
    assert 0.0 <= value <= 1.0
    assert (value == 1.0) == (length == budget)
    if length <= 2 * budget:
        assert value == pytest.approx(length_reward(2 * budget - length, budget), abs=1e-12)


@given(st.integers(1, 1000), st.integers(1, 50), st.floats(0.01, 1.0), st.integers(1, 1000))
def test_the_budget_falls_within_its_ends(initial, steps, decay, least):
    budget = ThoughtBudget(initial=max(initial, least), steps=steps, decay=decay, least=least)
    values = [budget.at(step) for step in range(steps + 2)]
    assert values[0] == budget.initial
    assert values == sorted(values, reverse=True)
    assert min(values) >= least
    assert set(values) <= set(budget.values)


# Rewards


def test_rewards_are_mixed_and_need_an_answer():
    objective = bound(ThoughtBudget(initial=40, steps=10, weight=0.25))
    (task,) = objective.posed([TASK], step=0)
    answered = AnsweredTask(
        task=task,
        prompt_ids=(),
        completions=(
            completion(40),
            completion(20),
            completion(60),
            completion(100),
            completion(40, "length"),
        ),
        predictions=(b" 4", b"no", b" 4", b" 4", None),
    )
    # 0.75 r + 0.25 r_len: right at the budget, wrong at half of it, right at 1.5 and 2.5 of it, no answer
    assert objective.rewards(answered) == (1.0, 0.125, 0.875, 0.75, 0.0)
    later = dataclasses.replace(answered, task=objective.posed([TASK], step=10)[0])  # 8 tokens: 40 * 0.2
    assert objective.rewards(later) == (0.75, 0.0, 0.75, 0.75, 0.0)


def test_without_weight_the_objective_alone_pays():
    objective = bound(ThoughtBudget(initial=40, steps=10, weight=0.0))
    (task,) = objective.posed([TASK], step=3)
    answered = AnsweredTask(
        task=task, prompt_ids=(), completions=(completion(7), completion(9)), predictions=(b" 4", b"x")
    )
    assert objective.rewards(answered) == bound(ThoughtBudget()).rewards(answered) == (1.0, 0.0)


def test_metrics_take_the_reward_apart():
    objective = bound(ThoughtBudget(initial=40, steps=10, weight=0.25))
    (task,) = objective.posed([TASK], step=0)
    completions, predictions = (completion(40), completion(20), completion(60)), (b" 4", b"no", None)
    answered = AnsweredTask(task=task, prompt_ids=(), completions=completions, predictions=predictions)
    group = RolloutGroup(
        task=task, prompt_ids=(), completions=completions, predictions=predictions,
        rewards=objective.rewards(answered),
    )  # fmt: skip
    metrics = objective.budget_metrics([group], step=0, pilot_size=None)
    assert metrics == {
        "rollout/thought_budget": 40.0,
        "rollout/over_budget_frac": pytest.approx(1 / 3),
        "reward/length_mean": pytest.approx((1 + 0.5 + 0) / 3),
        "reward/objective_mean": pytest.approx(1 / 3),
    }
    pilot = objective.budget_metrics([group], step=0, pilot_size=2)
    assert (pilot["reward/length_mean"], pilot["rollout/over_budget_frac"]) == (0.75, 0.0)
    assert objective.budget_metrics([], step=10, pilot_size=None) == {
        "rollout/thought_budget": 8.0, "rollout/over_budget_frac": 0.0, "reward/length_mean": 0.0,
        "reward/objective_mean": 0.0,
    }  # fmt: skip
    assert bound(ThoughtBudget()).budget_metrics([group], step=0, pilot_size=None) == {}


# Prompts

PLACES = [
    (ContinuationPrompt(), "AB\n\nThink and answer in at most 40 tokens.\n<think>"),
    (ChatPrompt("v0"), "\n\nThink and answer in at most 40 tokens.\n\n### Context\nAB<|im_end|>"),
    (ChatPrompt("v4"), "\n\nThink and answer in at most 40 tokens.\n\n### Context\n```\nAB\n```"),
    (ChatPrompt("v6"), "\n\nThink and answer in at most 40 tokens.\n\n### Context\n```\nAB\n```\n\nNow list"),
    (QuestionPrompt(), "AB\n\nThink and answer in at most 40 tokens.<|im_end|>"),
]


@pytest.mark.parametrize(("prompt", "expected"), PLACES, ids=["continuation", "v0", "v4", "v6", "question"])
def test_where_a_prompt_states_the_budget(prompt, expected):
    tokenizer = toys.byte_level()
    tokens, plain = TokenBytes(tokenizer), prompt.bind(tokenizer)
    stating = prompt.bind_with_notes(tokenizer)("Think and answer in at most 40 tokens.")
    context = tokens.encode_plain("AB")
    text = tokens.join(stating.prompt_ids(context)).decode()
    assert expected in text
    # Without the note it is the plain prompt, and answers have the same form.
    note = "\n\nThink and answer in at most 40 tokens."
    without = text.replace(note + "\n<think>", "<think>").replace(note, "")
    assert without == tokens.join(plain.prompt_ids(context)).decode()
    outside = {"prefix_ids": (), "suffix_ids": ()}
    assert dataclasses.replace(stating, **outside) == dataclasses.replace(plain, **outside)


def test_the_prompt_is_that_of_the_tasks_batch():
    tokenizer = toys.byte_level()
    objective = bound(ThoughtBudget(initial=100, steps=2, decay=0.25), tokenizer)
    text = TokenBytes(tokenizer)
    for step, number in [(0, 100), (1, 50), (2, 25), (None, 25)]:
        (task,) = objective.posed([TASK], step=step)
        assert task.budget == number
        assert f"at most {number} tokens." in text.join(objective.prompt_ids(task)).decode()
        assert objective.posed([task], step=1)[0].budget == 50  # posed anew


def test_a_task_that_was_not_posed_has_no_prompt():
    objective = bound(ThoughtBudget(initial=100, steps=2))
    with pytest.raises(AssertionError, match=r"doc:2.*never posed"):
        objective.prompt_ids(TASK)
    answered = AnsweredTask(task=TASK, prompt_ids=(), completions=(), predictions=())
    with pytest.raises(AssertionError, match="never posed"):
        objective.rewards(answered)


def test_without_a_wording_only_the_reward_tells():
    tokenizer = toys.byte_level()
    silent, plain = (
        bound(ThoughtBudget(initial=100, steps=2, wording=None), tokenizer),
        bound(ThoughtBudget(), tokenizer),
    )
    (task,) = silent.posed([TASK], step=0)
    assert silent.prompt_ids(task) == plain.prompt_ids(TASK)
    assert silent.num_overhead_tokens == plain.num_overhead_tokens
    assert task.budget == 100


def test_without_a_budget_tasks_stay_as_they_are():
    assert bound(ThoughtBudget()).posed([TASK], step=7)[0] is TASK


def test_the_longest_prompt_counts():
    tokenizer = toys.byte_level()  # a digit is a token
    objective = bound(ThoughtBudget(initial=1000, steps=10, decay=0.001), tokenizer)
    lengths = [
        len(objective.prompt_ids(objective.posed([TASK], step=step)[0])) for step in (None, *range(11))
    ]
    assert len(set(lengths)) > 1
    assert objective.num_overhead_tokens == max(lengths) - len(TASK.context_ids)


def test_a_question_carries_a_budget_too():
    task = AnswerTask(question=Question(question_id="q", text="?", answer="1"), context_ids=(4,))
    (posed,) = bound(ThoughtBudget(initial=9, steps=1)).posed([task], step=0)
    assert (posed.budget, posed.task_id) == (9, "q")


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial": 800}, "steps, which is not set"),
        ({"initial": 10, "steps": 5, "least": 20}, "initial=10.*least=20.*begins below its smallest"),
        ({"initial": 0, "steps": 5}, "initial=0: give a number of at least 1"),
        ({"initial": 10, "steps": 0}, "steps=0"),
        ({"initial": 10, "steps": 5, "decay": 0.0}, "decay=0"),
        ({"initial": 10, "steps": 5, "decay": 1.5}, "decay=1.5"),
        ({"initial": 10, "steps": 5, "weight": 1.0}, "weight=1.0: give a number of at least 0 and below 1"),
        ({"initial": 10, "steps": 5, "weight": float("nan")}, "weight=nan"),
        ({"wording": "be brief"}, "wording='be brief': write {budget} once"),
        ({"wording": "{budget} of {budget}"}, "write {budget} once"),
        ({"heldout": 0}, "heldout=0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ThoughtBudget(**settings)


def test_a_budget_below_the_form_of_an_answer():
    tokenizer = toys.byte_level()
    form = bound(ThoughtBudget(), tokenizer).num_form_tokens
    tokens = TokenBytes(tokenizer)
    end = len(ContinuationPrompt().bind(tokenizer).answer_close_ids)
    assert (
        form
        == len(ContinuationPrompt().bind(tokenizer).close_ids)
        + len(tokens.encode_plain("\\boxed{"))
        + 1
        + end
    )
    small = ThoughtBudget(initial=500, steps=10, decay=0.002)  # ends at 1 token
    with pytest.raises(ValueError, match=f"smallest budget is 1 tokens.*takes {form} .*least to {form}"):
        bound(small, tokenizer).check_budget(max_completion_tokens=500)
    bound(dataclasses.replace(small, least=form), tokenizer).check_budget(max_completion_tokens=500)
    with pytest.raises(ValueError, match="smallest budget is 2 tokens"):
        bound(dataclasses.replace(small, least=form, heldout=2), tokenizer).check_budget(
            max_completion_tokens=500
        )
    with pytest.raises(ValueError, match=r"largest budget is 500 tokens.*max_completion_tokens 499"):
        bound(dataclasses.replace(small, least=form), tokenizer).check_budget(max_completion_tokens=499)


def test_the_form_of_an_objective_without_a_box():
    tokenizer = toys.byte_level()
    objective = InformationGainObjective(ContinuationPrompt()).bind(tokenizer)
    assert objective.num_form_tokens == len(objective.prompt.close_ids) + 1


def test_a_template_without_a_place_for_a_note(tiny_tokenizer):
    class Own(PromptTemplate):
        def bind(self, tokenizer):
            return ContinuationPrompt().bind(tokenizer)

    objective = bound(ThoughtBudget(initial=100, steps=2), tiny_tokenizer, Own())
    (task,) = objective.posed([TASK], step=0)
    with pytest.raises(ValueError, match="Own has no place for a note"):
        objective.prompt_ids(task)


def test_a_chat_template_that_hides_the_note():
    template = "{% for m in messages %}{{ m.content.split('\n\n')[-1] }}{% endfor %}"
    with pytest.raises(ValueError, match="shows a note 0 times"):
        ChatPrompt("v0").bind_with_notes(toys.byte_level(chat_template=template))


def test_a_task_that_cannot_carry_a_budget():
    @dataclasses.dataclass(frozen=True)
    class Plain:
        task_id: str = "p"

    with pytest.raises(ValueError, match="Plain cannot carry a budget; give the dataclass a field"):
        bound(ThoughtBudget(initial=100, steps=2)).posed([Plain()], step=0)
