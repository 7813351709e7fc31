from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.information_gain import InformationGainObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import DenseReward
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.rollout.engines.hf_engine import HFEngine
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.thought_controls import MAX_ANSWER_TOKENS, thought_controls
from rpt_lightning.types import Completion, GenerationRequest, RolloutGroup, TokenIds, TokenTask


class Listening(ScriptedEngine):
    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        self.heard: list[list[GenerationRequest]] = [*getattr(self, "heard", []), list(requests)]
        return super().generate(requests)


def start(engine: Any, model_dir: Path, **options: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    engine.start(str(model_dir), seed=0, **options)
    engine.update_weights(model.named_parameters(remove_duplicate=False), version=0)
    return engine


@pytest.fixture
def engine(tiny_model_dir: Path) -> Iterator[Listening]:
    with Listening([" the}"]) as engine:
        yield start(engine, tiny_model_dir)


@pytest.fixture(scope="module")
def token_bytes(tiny_tokenizer) -> TokenBytes:
    return TokenBytes(tiny_tokenizer)


@pytest.fixture(scope="module")
def objective(tiny_tokenizer) -> BoundObjective:
    return NextTokenObjective(ContinuationPrompt(), DenseReward()).bind(tiny_tokenizer)  # any reward would do


def controls(
    engine: Any, objective: BoundObjective, groups: Sequence[RolloutGroup]
) -> dict[str, list[bool | None]]:
    return thought_controls(Rollouter(engine, objective, run_seed=0, score=lambda sequences: []), groups)


def said(token_bytes: TokenBytes, text: str) -> TokenIds:
    """Tokenise one byte at a time, which gives other tokens than the template."""
    return tuple(token_id for character in text for token_id in token_bytes.encode_plain(character))


def group(
    objective: BoundObjective,
    token_bytes: TokenBytes,
    doc: str,
    position: int,
    text: str,
    continuation: tuple[bytes, ...] = (b" the",),
) -> RolloutGroup:
    context = token_bytes.encode_plain(f"document {doc} at {position}:")
    task = TokenTask(
        task_id=f"{doc}:{position}", doc_id=doc, position=position, context_ids=context,
        continuation_ids=(1,) * len(continuation), continuation=continuation, entropy=1.0, true_prob=0.5,
        true_rank=0, answerable=True,
    )  # fmt: skip
    ids = said(token_bytes, text)
    completion = Completion(
        token_ids=(*ids, objective.prompt.stop_token_ids[0]), text_bytes=text.encode(),
        rollout_logprobs=(-1.0,) * (len(ids) + 1), policy_version=0, finish_reason="stop",
    )  # fmt: skip
    return RolloutGroup(
        task=task,
        prompt_ids=objective.prompt.prompt_ids(context),
        completions=(completion,),
        predictions=(None,),
        rewards=(0.0,),
    )


def forced(
    engine: Listening, token_bytes: TokenBytes, groups: Sequence[RolloutGroup], call: int
) -> list[bytes]:
    """Return what each request of a control contains after its prompt."""
    by_task = {group.task.task_id: group.prompt_ids for group in groups}
    texts = []
    for request in engine.heard[call]:
        prompt = by_task[request.task_id]
        assert request.prompt_ids[: len(prompt)] == prompt
        texts.append(token_bytes.join(request.prompt_ids[len(prompt) :]))
    return texts


def test_forced_thoughts_are_empty_or_of_another_document(
    engine: Listening, objective: BoundObjective, token_bytes: TokenBytes
) -> None:
    lines = {
        "a:1": "one</think>\\boxed{x}",
        "a:2": "no mark",
        "a:3": "t</think>hree</think> so \\boxed{y}",
        "b:1": "four</think>no box",
    }
    wanted = {"a:1": (b" the",), "a:2": (b" th", b"e"), "a:3": (b" theory",), "b:1": (b"the",)}
    groups = [
        group(objective, token_bytes, name[0], int(name[2]), text, wanted[name])
        for name, text in lines.items()
    ]
    answers = controls(engine, objective, groups)
    assert answers == {
        name: [True, True, False, False] for name in ("empty_thought", "shuffled_thought", "filler_thought")
    }
    assert forced(engine, token_bytes, groups, 0) == [b"</think>\\boxed{"] * 4
    # Half the batch away is a:3, of the same document as a:1. b:1 searches from a:2 on, which never closed
    # its thought.
    assert forced(engine, token_bytes, groups, 1) == [b"four</think>\\boxed{"] * 3 + [b"</think>\\boxed{"]
    # Each token is one byte, so there is one full stop for each byte.
    own = [b"...", b"", b"." * len("t</think>hree"), b"...."]
    assert forced(engine, token_bytes, groups, 2) == [thought + b"</think>\\boxed{" for thought in own]
    groups = [groups[3], groups[2]]
    controls(engine, objective, groups)
    assert forced(engine, token_bytes, groups, 4) == [
        b"t</think>hree</think>\\boxed{",
        b"four</think>\\boxed{",
    ]


def test_a_thought_is_found_in_whatever_tokens_it_was_written(
    engine: Listening, objective: BoundObjective, token_bytes: TokenBytes
) -> None:
    groups = [group(objective, token_bytes, doc, 1, f"{doc} says</think>\n\\boxed{{x}}") for doc in "ab"]
    for one in groups:
        open_ids, ids = objective.prompt.answer_open_ids, one.completions[0].token_ids
        assert all(ids[at : at + len(open_ids)] != open_ids for at in range(len(ids)))
    controls(engine, objective, groups)
    prompt = len(groups[0].prompt_ids)
    assert (
        engine.heard[1][0].prompt_ids[prompt:]
        == said(token_bytes, "b says") + objective.prompt.answer_open_ids
    )


def test_without_a_box_the_next_token_answers(
    tiny_model_dir: Path, tiny_tokenizer, token_bytes: TokenBytes
) -> None:
    objective = InformationGainObjective(ContinuationPrompt()).bind(tiny_tokenizer)
    first = token_bytes[token_bytes.encode_plain(" the sum")[0]]
    groups = [
        group(objective, token_bytes, "a", 1, "one</think> the", (first,)),
        group(objective, token_bytes, "b", 1, "four</think> the", (b"x",)),
    ]
    with Listening([" the sum"]) as engine:
        start(engine, tiny_model_dir)
        answers = controls(engine, objective, groups)
        assert answers["shuffled_thought"] == [True, False]
        assert forced(engine, token_bytes, groups, 1) == [b"four</think>", b"one</think>"]
        assert {request.sampling.max_tokens for request in engine.heard[1]} == {1}


def test_without_another_document_nothing_is_shuffled(
    engine: Listening, objective: BoundObjective, token_bytes: TokenBytes
) -> None:
    groups = [group(objective, token_bytes, "a", position, "x</think>\\boxed{y}") for position in (1, 2)]
    assert controls(engine, objective, groups) == {
        "empty_thought": [True, True],
        "shuffled_thought": [None, None],
        "filler_thought": [True, True],
    }
    assert controls(engine, objective, []) == {
        "empty_thought": [],
        "shuffled_thought": [],
        "filler_thought": [],
    }


def test_what_is_too_long_for_the_engine_is_not_measured(
    tiny_model_dir: Path, objective: BoundObjective, token_bytes: TokenBytes
) -> None:
    groups = [
        group(objective, token_bytes, "a", 1, "x</think>\\boxed{y}"),
        group(objective, token_bytes, "b", 1, "x" * 40 + "</think>\\boxed{y}"),
    ]
    length = len(groups[0].prompt_ids) + len(objective.prompt.answer_open_ids) + MAX_ANSWER_TOKENS
    assert len(groups[0].prompt_ids) == len(groups[1].prompt_ids)
    for max_model_len, expected in [(length + 39, None), (length + 40, True)]:
        with Listening([" the}"]) as engine:
            start(engine, tiny_model_dir, max_model_len=max_model_len)
            answers = controls(engine, objective, groups)
        assert answers == {
            "empty_thought": [True, True],
            "shuffled_thought": [expected, True],
            "filler_thought": [True, expected],
        }


@pytest.mark.parametrize(
    ("said", "is_right"),
    [(" the}" + " and so on" * 20, True), (" the" + " and so on" * 20, False), (" the{}}!", False)],
)
def test_what_stands_in_the_box_counts_whatever_follows(
    said: str, is_right: bool, tiny_model_dir: Path, objective: BoundObjective, token_bytes: TokenBytes
) -> None:
    """An ordinary answer may take thousands of tokens to end. Here only the box counts."""
    with Listening([said]) as engine:
        start(engine, tiny_model_dir)
        answers = controls(
            engine, objective, [group(objective, token_bytes, doc, 1, "x</think>") for doc in "ab"]
        )
    assert answers == {
        "empty_thought": [is_right] * 2,
        "shuffled_thought": [is_right] * 2,
        "filler_thought": [is_right] * 2,
    }


def test_a_real_engine_continues_the_forced_text(
    tiny_model_dir: Path, objective: BoundObjective, token_bytes: TokenBytes
) -> None:
    groups = [group(objective, token_bytes, doc, 1, f"{doc}</think>\\boxed{{y}}") for doc in "ab"]
    with HFEngine(dtype="float32", device="cpu") as engine:
        start(engine, tiny_model_dir)
        answers = controls(engine, objective, groups)
    # Random weights put nothing right into a box.
    assert answers == {
        "empty_thought": [False, False],
        "shuffled_thought": [False, False],
        "filler_thought": [False, False],
    }
