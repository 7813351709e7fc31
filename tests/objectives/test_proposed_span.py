"""The policy names a span, is asked to find it, and both earn what PretrainZero says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.masked_span import MaskedSpanObjective, SpanTask
from rpt_lightning.objectives.proposed_span import Paragraph, ProposedSpanObjective
from rpt_lightning.objectives.thought_budget import ThoughtBudget
from rpt_lightning.types import AnsweredTask, Completion, RolloutGroup, TokenTask

TEXT = "The old cat saw the dog, and the dog ran off."


def bound_to(tokenizer, *, question: str = "Which?", budget: ThoughtBudget | None = None, **spans):
    objective = ProposedSpanObjective(MaskedSpanObjective(question="Find it.", **spans), question=question)
    return objective.bind(tokenizer) if budget is None else objective.bind(tokenizer, budget)


@pytest.fixture(scope="module")
def bound(tiny_tokenizer) -> BoundObjective:
    return bound_to(tiny_tokenizer, max_length=2, max_tokens=12)


def place_in(bound: BoundObjective, text: str, *, before: str, left_out: int = 0) -> TokenTask:
    """A place of the data, whose context lost ``left_out`` tokens on the left."""
    token_ids = bound.tokens.encode_plain(text)
    position = len(bound.tokens.encode_plain(before))
    continuation_ids = token_ids[position : position + 16]
    return TokenTask(
        task_id=f"d:{position}",
        doc_id="d",
        position=position,
        context_ids=token_ids[left_out:position],
        continuation_ids=continuation_ids,
        continuation=tuple(bound.tokens[token] for token in continuation_ids),
        entropy=1.0,
        true_prob=0.5,
        true_rank=0,
        answerable=True,
        following_ids=token_ids[position : position + bound.objective.num_following_tokens],
    )


def completions_of(predictions) -> tuple[Completion, ...]:
    return tuple(
        Completion(
            token_ids=(1,),
            text_bytes=b"no box" if prediction is None else b"</think>\\boxed{" + prediction + b"}",
            rollout_logprobs=(0.0,),
            policy_version=0,
            finish_reason="stop",
        )
        for prediction in predictions
    )


def answered_by(bound: BoundObjective, task, predictions) -> AnsweredTask:
    completions = completions_of(predictions)
    return AnsweredTask(
        task=task,
        prompt_ids=bound.prompt_ids(task),
        completions=completions,
        predictions=tuple(map(bound.prediction, completions)),
    )


def group_of(bound: BoundObjective, task, predictions) -> RolloutGroup:
    answered = answered_by(bound, task, predictions)
    return RolloutGroup(
        task=task,
        prompt_ids=answered.prompt_ids,
        completions=answered.completions,
        predictions=answered.predictions,
        rewards=bound.rewards(answered),
        truth=bound.truth(task),
    )


def paragraph_in(bound: BoundObjective, place: TokenTask) -> Paragraph:
    (task,) = bound.posed([place], step=3)
    assert isinstance(task, Paragraph)
    return task


def test_training_shows_a_paragraph_and_validation_a_masked_span(bound):
    place = place_in(bound, TEXT, before="The old")
    paragraph = paragraph_in(bound, place)
    shown = bound.tokens.join(bound.prompt_ids(paragraph)).decode()
    assert shown == TEXT + "Which?<think>"
    assert len(bound.prompt_ids(paragraph)) <= len(place.context_ids) + bound.num_overhead_tokens
    assert bound.posed([place], step=None) == (place,)
    assert b" ____" in bound.tokens.join(bound.prompt_ids(place))
    alone = bound.objective.spans.bind(bound._tokenizer)
    assert bound.prompt_ids(place) == alone.prompt_ids(place)
    assert bound.truth(place) == alone.truth(place)
    assert bound.direct_sequence(place) == alone.direct_sequence(place)
    assert bound.objective.places == alone.objective.places


def test_each_valid_span_is_asked_for_once(bound):
    paragraph = paragraph_in(bound, place_in(bound, TEXT, before="The old"))
    named = [
        b"cat",
        b"saw the",
        b"cat",
        b"dog",
        b"the",
        b"The",
        b"cow",
        b"cats",
        b" cat",
        b"dog, and",
        None,
        b"",
    ]
    tasks = bound.follow_ups(answered_by(bound, paragraph, named))
    # "dog" and "the" stand there twice, "The" has nothing before it, and the others are no words of it.
    assert [b"".join(bound.truth(task)) for task in tasks] == [b"cat", b"saw the"]
    shown = [bound.tokens.join(bound.prompt_ids(task)).decode() for task in tasks]
    assert shown == [
        TEXT.replace("cat", "____") + "Find it.<think>",
        TEXT.replace("saw the", "____") + "Find it.<think>",
    ]
    assert len({task.task_id for task in tasks} | {paragraph.task_id}) == 3
    for task in tasks:
        assert len(bound.prompt_ids(task)) <= len(paragraph.context_ids) + bound.num_overhead_tokens
        assert (
            bound.tokens.join(task.context_ids).decode() == TEXT[: len(bound.tokens.join(task.context_ids))]
        )


def test_positions_of_spans_are_those_of_the_document(bound):
    """The next-token term trains contexts by document and position, also of those that were cut."""
    token_ids = bound.tokens.encode_plain(TEXT)
    for left_out in (0, 2):
        place = place_in(bound, TEXT, before="The old cat saw", left_out=left_out)
        if left_out:
            place = replace(place, rest_ids=token_ids[place.position :])
        (task,) = bound.follow_ups(answered_by(bound, paragraph_in(bound, place), [b"ran"]))
        assert task.context_ids == token_ids[left_out : task.position]
        assert bound.tokens.join(token_ids[task.position :]).startswith(b" ran")
        assert task.rest_ids == (token_ids[task.position :] if left_out else ())


def test_the_proposer_earns_what_is_left_of_the_solvers(bound):
    """Found by 1 of 4, by none and by all of them: 3/4, 0 and 0."""
    paragraph = paragraph_in(bound, place_in(bound, TEXT, before="The old"))
    answered = answered_by(bound, paragraph, [b"old", b"cat", b"saw", b"dog", None, b"old"])
    tasks = bound.follow_ups(answered)
    answers = {
        b"old": [b"old", b"new", b" old", None],
        b"cat": [b"dog", b"dog", None, b"Cat"],
        b"saw": [b"saw"] * 4,
    }
    groups = tuple(group_of(bound, task, answers[b"".join(bound.truth(task))]) for task in tasks)
    assert [group.rewards for group in groups] == [(1, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1)]
    assert bound.rewards(replace(answered, follow_ups=groups)) == (0.75, 0.0, 0.0, 0.0, 0.0, 0.75)
    proposer = RolloutGroup(
        task=paragraph,
        prompt_ids=(),
        completions=answered.completions,
        predictions=answered.predictions,
        rewards=(0.75, 0.0, 0.0, 0.0, 0.0, 0.75),
    )
    assert bound.objective.take_metrics([proposer, *groups]) == {
        "proposal/written": 6.0,
        "proposal/rewarded": 2.0,
        "proposal/spans": 3.0,
        "proposal/never_found": 1.0,
        "proposal/always_found": 1.0,
    }
    assert set(bound.objective.take_metrics([])) == set(bound.objective.take_metrics([proposer]))


def test_a_length_term_does_not_count_as_found(tiny_tokenizer):
    """With a budget, wrong answers earn something too. The proposer is rewarded by right ones alone."""
    bound = bound_to(tiny_tokenizer, budget=ThoughtBudget(initial=4, steps=1, weight=0.5))
    paragraph = paragraph_in(bound, place_in(bound, TEXT, before="The old"))
    answered = answered_by(bound, paragraph, [b"cat", b"old"])
    tasks = bound.follow_ups(answered)
    assert [task.budget for task in tasks] == [paragraph.budget] * 2
    groups = tuple(
        group_of(bound, task, answer)
        for task, answer in zip(tasks, [[b"dog"] * 2, [b"old", None]], strict=True)
    )
    assert groups[0].rewards[0] > 0
    first, second = bound.rewards(replace(answered, follow_ups=groups))
    assert second - first == pytest.approx(0.5 * 0.5)  # (1 - w) (1 - p), for p of 1/2


TEXTS = st.lists(
    st.sampled_from(["cat", "dog", "été", "don't", "co-op", "和", "🙂", ",", "(", "\n"]),
    min_size=2,
    max_size=20,
).map(" ".join)


@pytest.mark.parametrize(
    "spans", [{}, {"max_length": 3, "max_tokens": 12}, {"unit": "token", "max_length": 2}], ids=str
)
@given(text=TEXTS)
def test_what_may_be_named_is_hidden_whole_and_stands_nowhere_else(tiny_tokenizer, spans, text):
    bound = _bound_once(tiny_tokenizer, spans)
    text = "So " + text + " end."
    place = place_in(bound, text, before="So")
    paragraph = paragraph_in(bound, place)
    shown_text = bound.tokens.join(paragraph.shown_ids)
    shown = [bound.tokens[token] for token in paragraph.shown_ids]
    all_named = list(bound.objective.spans.spans(shown))
    for task in bound.follow_ups(answered_by(bound, paragraph, all_named)):
        assert isinstance(task, SpanTask)
        hidden = b"".join(bound.truth(task))
        hidden.decode()
        before, mark, behind = (
            bound.tokens.join(bound.objective.context_ids(task, bound.tokens))
            .removesuffix(b"Find it.")
            .partition(b"____")
        )
        assert mark
        assert before + hidden + behind == shown_text
        # Whatever else is shown, this span could not be named again.
        left = [bound.tokens[token] for token in task.context_ids]
        right = [bound.tokens[token] for token in task.behind_ids]
        assert hidden not in bound.objective.spans.spans([b"", *left])
        assert hidden not in bound.objective.spans.spans([b"\n", *right])
        assert bound.is_right(hidden, task)
        assert not bound.is_right(hidden[:-1], task)


_BOUND: dict[str, BoundObjective] = {}


def _bound_once(tokenizer, spans) -> BoundObjective:
    if str(spans) not in _BOUND:
        _BOUND[str(spans)] = bound_to(tokenizer, **spans)
    return _BOUND[str(spans)]


def test_a_proposal_needs_a_question():
    with pytest.raises(ValueError, match="question is empty"):
        ProposedSpanObjective(MaskedSpanObjective(), question=" ")
