"""Next segment (RLPT): tasks, rewards, what is right, and what the policy sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.judges.segment_judge import JudgeQuestion, SegmentJudge, verdict
from rpt_lightning.objectives.next_segment import NextSegmentObjective, Segment, segment_of
from rpt_lightning.objectives.prompts.template import ChatPrompt, ContinuationPrompt, QuestionPrompt
from rpt_lightning.objectives.rewards.segment import (
    JudgeReward,
    LogProbGainReward,
    PrefixShareReward,
    mean_gain,
    prefix_share,
)
from rpt_lightning.objectives.split_documents import SplitDocuments
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import AnsweredTask, Completion, TokenTask

TEXT = "We went out early. It rained a lot. So we came home. The fire was warm."


def documents_of(tokenizer: Any, *texts: str, is_cut: bool = False) -> SplitDocuments:
    tokens = TokenBytes(tokenizer)
    return SplitDocuments(
        [f"d{number}" for number in range(len(texts))],
        [np.array(tokens.encode_plain(text), dtype=np.int32) for text in texts],
        [is_cut] * len(texts),
        tokens,
    )


def task_of(objective: Any, documents: SplitDocuments, position: int, number: int = 0) -> TokenTask:
    material = objective.material(documents, number, position)
    assert material is not None
    pieces = documents.pieces(number)
    ids = documents.tokens.encode_plain(b"".join(pieces).decode())
    return TokenTask(
        task_id=f"{documents.doc_ids[number]}:{position}",
        doc_id=documents.doc_ids[number],
        position=position,
        context_ids=ids[:position],
        continuation_ids=ids[position : position + 8],
        continuation=pieces[position : position + 8],
        entropy=1.0,
        true_prob=0.5,
        true_rank=0,
        answerable=True,
        material=material,
    )


def positions_of(objective: Any, documents: SplitDocuments, number: int = 0) -> list[int]:
    pieces = documents.pieces(number)
    return [position for position in range(len(pieces)) if objective.may_ask(pieces, position)]


def answered(bound: BoundObjective, task: TokenTask, *texts: str) -> AnsweredTask:
    completions = tuple(
        Completion(
            token_ids=bound.tokens.encode_plain(text),
            text_bytes=text.encode(),
            rollout_logprobs=(-1.0,) * len(bound.tokens.encode_plain(text)),
            policy_version=0,
            finish_reason="stop",
        )
        for text in texts
    )
    return AnsweredTask(
        task=task,
        prompt_ids=bound.prompt_ids(task),
        completions=completions,
        predictions=tuple(map(bound.prediction, completions)),
    )


def boxed(*texts: str) -> list[str]:
    return [f"hm</think>\\boxed{{{text}}}" for text in texts]


class ScriptedJudge(SegmentJudge):
    """Gives the next of its replies to each prompt and keeps what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.script = list(replies)
        self.asked: list[tuple[int, list[str]]] = []

    def replies(self, prompts: Sequence[str], *, attempt: int) -> list[str]:
        self.asked.append((attempt, list(prompts)))
        return [self.script.pop(0) for _ in prompts]


@pytest.fixture
def second(tiny_tokenizer):
    """The task "It rained a lot." of the text, without the sentence behind it."""
    objective = NextSegmentObjective(middle_share=0.0)
    documents = documents_of(tiny_tokenizer, TEXT)
    return task_of(objective, documents, positions_of(objective, documents)[1])


def test_tasks_are_the_sentences_of_a_text(tiny_tokenizer):
    objective, documents = NextSegmentObjective(), documents_of(tiny_tokenizer, TEXT)
    positions = positions_of(objective, documents)
    segments = [segment_of(task_of(objective, documents, position)) for position in positions]
    texts = [one.text.strip() for one in segments]
    assert texts == ["We went out early.", "It rained a lot.", "So we came home.", "The fire was warm."]
    assert [one.behind for one in segments] == [tuple(texts[1:]), tuple(texts[2:]), tuple(texts[3:]), ()]
    assert [one.shows_next for one in segments] == [True, True, True, False]
    for position, one in zip(positions, segments, strict=True):
        assert b"".join(documents.pieces(0)[position:]).startswith(one.text.encode())


def test_sentences_that_are_no_tasks(tiny_tokenizer):
    texts = (
        "Oh no. We went out early. It is { open. It has \\boxed{one} inside. It is {well} closed.\n\n"
        "A title\n\nIt comes after a title."
    )
    objective, documents = NextSegmentObjective(), documents_of(tiny_tokenizer, texts)
    found = [
        segment_of(task_of(objective, documents, position)) for position in positions_of(objective, documents)
    ]
    assert [one.text.strip() for one in found] == [
        "We went out early.",
        "It is {well} closed.",
        "It comes after a title.",
    ]
    # What follows a title does not follow the sentence before it.
    assert found[1].behind == ()
    # A sentence with too many tokens is left out, and is not shown either.
    long = NextSegmentObjective(max_tokens=8)
    documents = documents_of(tiny_tokenizer, f"It is so. {'It goes on and on ' * 5}now. It is so again.")
    positions = positions_of(long, documents)
    assert [long.material(documents, 0, position) is None for position in positions][:2] == [False, True]
    assert not segment_of(task_of(long, documents, positions[0])).shows_next


def test_a_sentence_said_twice_does_not_show_the_answer(tiny_tokenizer):
    objective = NextSegmentObjective()
    documents = documents_of(tiny_tokenizer, "It rained a lot. It rained\na lot. We went home.")
    first, second = (task_of(objective, documents, p) for p in positions_of(objective, documents)[:2])
    assert not segment_of(first).shows_next
    assert segment_of(second).shows_next
    assert not NextSegmentObjective(middle_share=1.0).asks_middle(first)


def test_the_end_of_a_truncated_document_is_no_sentence(tiny_tokenizer):
    objective = NextSegmentObjective()
    for is_cut, expected in ((False, 4), (True, 3)):
        documents = documents_of(tiny_tokenizer, TEXT, is_cut=is_cut)
        materials = [
            objective.material(documents, 0, position) for position in positions_of(objective, documents)
        ]
        assert sum(material is not None for material in materials) == expected
    assert "The fire" not in "".join(material or "" for material in materials)


def test_prefix_share_by_hand():
    truth = b"The cat sat."
    assert prefix_share(b"The cat ran.", truth) == 8 / 12
    assert prefix_share(b"The", truth) == 3 / 12
    assert prefix_share(b"The cat sat. Then it went.", truth) == 12 / 26
    assert prefix_share(b"A cat sat.", truth) == 0.0
    assert prefix_share("Thé".encode(), "Thê".encode()) == 3 / 4  # bytes: C3 A9, C3 AA
    assert prefix_share(b"", b"") == 0.0


@given(st.binary(max_size=30), st.binary(min_size=1, max_size=30))
def test_prefix_share(prediction: bytes, truth: bytes):
    share = prefix_share(prediction, truth)
    assert 0.0 <= share <= 1.0
    assert (share == 1.0) == (prediction.strip() == truth.strip() != b"")
    assert prefix_share(b" " + truth + b"\n", truth) == float(truth.strip() != b"")
    # A longer right beginning earns more.
    stripped = truth.strip()
    shares = [prefix_share(stripped[:length], stripped) for length in range(len(stripped) + 1)]
    assert shares == sorted(shares)


def test_prefix_share_of_a_group(tiny_tokenizer, second):
    bound = NextSegmentObjective(middle_share=0.0).bind(tiny_tokenizer)
    group = answered(bound, second, *boxed(" It rained a lot.", "It rained all day.", ""), "never closed")
    assert bound.rewards(group) == pytest.approx((1.0, 11 / 18, 0.0, 0.0))  # "It rained a"


def test_right_is_the_sentence_itself(tiny_tokenizer, second):
    for reward in (PrefixShareReward(), LogProbGainReward(), JudgeReward(ScriptedJudge())):
        bound = NextSegmentObjective(reward=reward, middle_share=0.0).bind(tiny_tokenizer)
        assert bound.truth(second) == (b"It rained a lot.",)
        for text, is_right in [
            (" It rained a lot.", True),
            ("It rained a lot.\n", True),
            ("It rained a lot", False),
            ("it rained a lot.", False),
            ("It rained  a lot.", False),
            ("It rained a lot. So we came home.", False),
        ]:
            (prediction,) = answered(bound, second, *boxed(text)).predictions
            assert bound.is_right(prediction, second) is is_right


def test_no_reasoning_is_the_sentence_in_an_open_box(tiny_tokenizer, second):
    bound = NextSegmentObjective(middle_share=0.0).bind(tiny_tokenizer)
    direct = bound.direct_sequence(second)
    prompt = bound.tokens.join(direct.prompt_ids)
    assert prompt == b"We went out early.<think></think>\\boxed{"
    assert bound.tokens.join(direct.target_ids) == b" It rained a lot.}"
    chat = NextSegmentObjective(QuestionPrompt(), middle_share=0.0).bind(tiny_tokenizer)
    assert chat.tokens.join(chat.direct_sequence(second).target_ids) == b"It rained a lot.}"


def test_what_the_policy_sees(tiny_tokenizer, second):
    for prompt in (ContinuationPrompt(), QuestionPrompt()):
        is_chat = isinstance(prompt, QuestionPrompt)
        for share in (0.0, 1.0):
            objective = NextSegmentObjective(prompt, middle_share=share)
            bound = objective.bind(tiny_tokenizer)
            context = objective.context_ids(second, bound.tokens)
            # Tasks of a document share their beginning.
            assert context[: len(second.context_ids)] == second.context_ids
            added = context[len(second.context_ids) :]
            assert len(added) <= objective.num_added_tokens
            shown = bound.tokens.join(added).decode()
            assert ("So we came home." in shown) == bool(share)
            assert "It rained" not in shown
            assert ("\\boxed{}" in shown) == is_chat
            if not is_chat:
                assert shown == (" ____ So we came home." if share else "")
            assert len(bound.prompt_ids(second)) <= len(second.context_ids) + bound.num_overhead_tokens


def test_the_share_of_middle_segments(second):
    tasks = [replace(second, task_id=f"d:{number}") for number in range(2000)]
    for share in (0.0, 0.25, 1.0):
        objective = NextSegmentObjective(middle_share=share)
        num = sum(map(objective.asks_middle, tasks))
        assert abs(num - 2000 * share) <= 4 * math.sqrt(2000 * share * (1 - share))
        assert [objective.asks_middle(task) for task in tasks] == [
            NextSegmentObjective(middle_share=share).asks_middle(task) for task in tasks
        ]
    differing = [
        NextSegmentObjective(middle_share=0.5, seed=seed).asks_middle(task)
        for task in tasks[:50]
        for seed in (0, 1)
    ]
    assert differing[::2] != differing[1::2]
    last = replace(second, material=Segment(text=" It is.", behind=(), shows_next=False).to_text())
    assert not NextSegmentObjective(middle_share=1.0).asks_middle(last)


def test_log_prob_gain_by_hand(tiny_tokenizer, second):
    bound = NextSegmentObjective(reward=LogProbGainReward(), middle_share=0.0).bind(tiny_tokenizer)
    group = answered(bound, second, *boxed("a", "b"), "never closed")
    without, good, bad, unclosed = bound.scored_sequences(group)
    assert without.prompt_ids == bound.direct_sequence(second).prompt_ids
    assert bound.tokens.join(without.target_ids) == b" It rained a lot."
    assert unclosed is None
    assert bound.tokens.join(good.prompt_ids) == b"We went out early.<think>hm</think>\\boxed{"
    assert good.target_ids == bad.target_ids == without.target_ids
    scored = replace(
        group,
        logprobs=(
            (math.log(1 / 4), math.log(1 / 8)),
            (math.log(1 / 2), math.log(1 / 2)),  # log 8 over two tokens
            (math.log(1 / 8), math.log(1 / 16)),  # -log 4 over two tokens
            None,
        ),
    )
    assert bound.rewards(scored) == pytest.approx((math.log(8) / 2, -math.log(2), -math.log(2)))
    assert mean_gain([-1.0, -2.0, -3.0], [-4.0, -4.0, -4.0]) == pytest.approx(2.0)
    # Only the thought and its marker are trained.
    ids = group.completions[0].token_ids[: bound.num_trained(group.completions[0])]
    assert bound.tokens.join(ids) == b"hm</think>"
    assert bound.num_trained(group.completions[2]) == len(group.completions[2].token_ids)
    other = NextSegmentObjective(middle_share=0.0).bind(tiny_tokenizer)
    assert other.num_trained(group.completions[0]) == len(group.completions[0].token_ids)


def test_an_empty_thought_gains_nothing(tiny_tokenizer, second):
    for share in (0.0, 1.0):
        bound = NextSegmentObjective(reward=LogProbGainReward(), middle_share=share).bind(tiny_tokenizer)
        group = answered(bound, second, "</think>\\boxed{x}")
        without, after = bound.scored_sequences(group)
        assert without == after
        assert bound.rewards(replace(group, logprobs=((-3.0, -1.0), (-3.0, -1.0)))) == (0.0,)


def test_a_judge_decides(tiny_tokenizer, second):
    judge = ScriptedJudge("Fits.\nScore: 1", "Score: 0")
    bound = NextSegmentObjective(reward=JudgeReward(judge), middle_share=0.0).bind(tiny_tokenizer)
    predictions = ["It was wet.", " It rained a lot. ", "It snowed.", "It was wet.", ""]
    group = answered(bound, second, *boxed(*predictions), "never closed")
    assert bound.rewards(group) == (1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    ((attempt, prompts),) = (
        judge.asked
    )  # the truth, nothing, and the same prediction twice are not asked about
    assert attempt == 0
    assert [("It was wet." in prompt, "It snowed." in prompt) for prompt in prompts] == [
        (True, False),
        (False, True),
    ]
    assert all("It rained a lot. So we came home. The fire was warm." in prompt for prompt in prompts)
    take = bound.objective.take_metrics
    assert take([]) == {"judge/asked": 2.0, "judge/unreadable": 0.0}
    assert take([]) == {"judge/asked": 0.0, "judge/unreadable": 0.0}


def test_a_judge_of_a_middle_segment_sees_the_segment_alone(tiny_tokenizer, second):
    judge = ScriptedJudge("Score: 1")
    bound = NextSegmentObjective(reward=JudgeReward(judge), middle_share=1.0).bind(tiny_tokenizer)
    bound.rewards(answered(bound, second, *boxed("So we came home.")))
    assert "### Reference\nIt rained a lot.\n\n###" in judge.asked[0][1][0]


def test_a_reply_without_a_verdict_is_asked_for_once_more(tiny_tokenizer, second):
    judge = ScriptedJudge("Well.", "Score: 0", "Score: 1")
    bound = NextSegmentObjective(reward=JudgeReward(judge), middle_share=0.0).bind(tiny_tokenizer)
    assert bound.rewards(answered(bound, second, *boxed("One.", "Two."))) == (1.0, 0.0)
    assert [(attempt, len(prompts)) for attempt, prompts in judge.asked] == [(0, 2), (1, 1)]
    assert bound.objective.take_metrics([]) == {"judge/asked": 2.0, "judge/unreadable": 1.0}


def test_two_replies_without_a_verdict_are_an_error(tiny_tokenizer, second):
    reward = JudgeReward(ScriptedJudge("Well.", "Who knows"))
    bound = NextSegmentObjective(reward=reward, middle_share=0.0).bind(tiny_tokenizer)
    with pytest.raises(ValueError, match=r"reward\.judge ScriptedJudge: twice no verdict.*'Who knows'"):
        bound.rewards(answered(bound, second, *boxed("One.")))
    assert bound.objective.take_metrics([]) == {"judge/asked": 1.0, "judge/unreadable": 2.0}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Score: 1", True),
        ("score = 0.", False),
        ("I first thought Score: 1, but no.\nScore: 0", False),
        (" 1\n", True),
        ("Score: 1/1", True),
        ("Score: 0.5", None),
        ("Score: 10", None),
        ("Score: yes", None),
        ("", None),
        ("10", None),
    ],
)
def test_verdicts(reply, expected):
    assert verdict(reply) is expected


def test_texts_in_a_question_are_left_as_they_are():
    question = JudgeQuestion(prediction="{reference} {0}", reference="a {prediction} {b}")
    assert "### Reference\na {prediction} {b}\n" in question.prompt
    assert "### Prediction\n{reference} {0}\n" in question.prompt


def test_refused_options():
    with pytest.raises(ValueError, match="NextSegmentObjective cannot use ChatPrompt"):
        NextSegmentObjective(ChatPrompt())
    with pytest.raises(ValueError, match=r"middle_share 1\.5: give a share"):
        NextSegmentObjective(middle_share=1.5)
    with pytest.raises(ValueError, match="max_tokens=0: must be at least 1"):
        NextSegmentObjective(max_tokens=0)
    with pytest.raises(ValueError, match="LogProbGainReward needs to know where a thought ends"):
        NextSegmentObjective(ContinuationPrompt(None, None), LogProbGainReward())


def test_a_task_that_was_prepared_for_something_else(tiny_tokenizer, second):
    bound = NextSegmentObjective().bind(tiny_tokenizer)
    with pytest.raises(ValueError, match="was not prepared for NextSegmentObjective; prepare a folder"):
        bound.truth(replace(second, material=""))
