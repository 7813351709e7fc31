"""Tasks that follow from completions: which are rolled out, with which seeds, and how they share a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.masked_span import MaskedSpanObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.proposed_span import Paragraph, ProposedSpanObjective
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.rollout.dynamic_sampling import fill_batch
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.follow_ups import FollowUpRollout, check_follow_ups
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.settings import Sampling, Selection
from rpt_lightning.types import RolloutGroup, TokenTask

TEXTS = ["The old cat saw a dog.", "A new map of the sea.", "Some birds sing at night.", "One, two, three."]
LINES = [f"</think>\\boxed{{{word}}}" for word in ("cat", "dog", "map", "sea", "sing", "at", "old")] + [
    "no box"
]


class Recording(ScriptedEngine):
    """Keeps all requests."""

    def _generate(self, requests):
        self.requests = [*getattr(self, "requests", []), *requests]
        return super()._generate(requests)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with Recording(LINES) as engine:
        engine.start(str(tiny_model_dir), seed=0)
        engine.update_weights(model.named_parameters(remove_duplicate=False), version=5)
        yield engine


@pytest.fixture(scope="module")
def bound(tiny_tokenizer) -> BoundObjective:
    return ProposedSpanObjective(MaskedSpanObjective()).bind(tiny_tokenizer)


@pytest.fixture
def rollouter(engine, bound) -> Rollouter:
    sampling = Sampling(max_completion_tokens=32)
    return Rollouter(engine, bound, run_seed=1, group_size=6, sampling=sampling)


@pytest.fixture
def paragraphs(bound: BoundObjective) -> list[Paragraph]:
    places = []
    for number in range(8):
        ids = bound.tokens.encode_plain(TEXTS[number % len(TEXTS)])
        places.append(
            TokenTask(
                task_id=f"d{number}:1", doc_id=f"d{number}", position=1, context_ids=ids[:1],
                continuation_ids=ids[1:], continuation=tuple(bound.tokens[token] for token in ids[1:]),
                entropy=1.0, true_prob=0.5, true_rank=0, answerable=True, following_ids=ids[1:],
            )
        )  # fmt: skip
    return list(bound.posed(places, step=0))


def test_proposals_are_answered_before_they_are_rewarded(rollouter, engine, paragraphs) -> None:
    groups = FollowUpRollout(rollouter).rollout(paragraphs)
    assert [group.task for group in groups] == paragraphs
    further = [one for group in groups for one in group.follow_ups]
    assert engine.events[-2:] == ["generate 8 requests", f"generate {len(further)} requests"]
    assert len(further) > 5
    for group in groups:
        found = {b"".join(one.truth): sum(one.rewards) / len(one.rewards) for one in group.follow_ups}
        assert group.rewards == tuple(
            1 - found[prediction] if found.get(prediction) else 0.0 for prediction in group.predictions
        )
        # What was named and stands there once was asked for.
        text = rollouter.objective.tokens.join(group.task.shown_ids)
        for prediction in group.predictions:
            assert (prediction in found) == (
                prediction is not None and f" {prediction.decode()}" in text.decode().replace(".", " ")
            )
    assert any(reward > 0 for group in groups for reward in group.rewards)
    assert {one.policy_version for group in groups + further for one in group.completions} == {5}


def test_all_completions_of_a_step_have_seeds_of_their_own(rollouter, engine, paragraphs) -> None:
    rollout = FollowUpRollout(rollouter).rollout
    engine.requests = []
    # The same paragraphs again, as in a small corpus that starts over with the same weights.
    for _ in range(2):
        rollout(paragraphs)
    seeds = [request.seed + index for request in engine.requests for index in range(request.n)]
    assert len(set(seeds)) == len(seeds) > 2 * 8 * 6


def test_a_rank_without_tasks_generates_as_often(rollouter, paragraphs) -> None:
    """Generation is a collective, so the ranks would otherwise wait for each other."""
    calls: list[int] = []

    def counted(generate):
        return lambda requests: (calls.append(len(requests)), generate(requests))[1]

    rollouter.share_work = counted
    assert FollowUpRollout(rollouter).rollout([]) == []
    assert calls == [0, 0]
    groups = FollowUpRollout(rollouter).rollout(paragraphs)
    assert calls[2:] == [8, sum(len(group.follow_ups) for group in groups)]


def test_a_task_does_not_depend_on_the_others(rollouter, paragraphs, engine) -> None:
    whole = FollowUpRollout(rollouter).rollout(paragraphs)
    again = Rollouter(
        engine, rollouter.objective, run_seed=1, group_size=6, sampling=Sampling(max_completion_tokens=32)
    )
    parts = [group for task in paragraphs for group in FollowUpRollout(again).rollout([task])]
    assert parts == whole


def test_a_family_shares_one_place(rollouter, paragraphs) -> None:
    """A place is kept if any group in it has a gradient, and given up with all of its groups."""
    rolled: list[RolloutGroup] = []

    def rollout(tasks: Sequence) -> list[RolloutGroup]:
        groups = FollowUpRollout(rollouter).rollout(tasks)
        rolled.extend(groups)
        return groups

    drawn = iter(paragraphs[4:])
    filled = fill_batch(
        rollout,
        lambda wanted: [next(drawn) for _ in range(min(wanted[0], 4))],
        paragraphs[:4],
        max_extra_tasks=4,
    )
    has_gradient = {
        group.task.task_id: any(one.is_live for one in (group, *group.follow_ups)) for group in rolled
    }
    kept = [group for group in filled.groups if isinstance(group.task, Paragraph)]
    gone = [group for group in filled.replaced if isinstance(group.task, Paragraph)]
    assert len(kept) == 4
    assert len(kept) + len(gone) == len(rolled)
    assert gone
    assert not any(has_gradient[group.task.task_id] for group in gone)
    # Groups lie flat, each behind the one from which it follows.
    for groups in (filled.groups, filled.replaced):
        assert all(group.follow_ups == () for group in groups)
        by_id = {group.task.task_id: group for group in rolled}
        expected = [
            one.task.task_id
            for group in groups
            if isinstance(group.task, Paragraph)
            for one in (group, *by_id[group.task.task_id].follow_ups)
        ]
        assert [group.task.task_id for group in groups] == expected
    assert filled.num_dead == sum(not group.is_live for group in filled.groups)


def test_a_family_with_one_live_member_keeps_its_place(rollouter, paragraphs) -> None:
    groups = FollowUpRollout(rollouter).rollout(paragraphs)
    live = next(group for group in groups if any(one.is_live for one in group.follow_ups))
    kept = replace(live, rewards=(0.0,) * 6)
    assert not kept.is_live
    filled = fill_batch(
        lambda tasks: [kept for _ in tasks], lambda wanted: [], [kept.task], max_extra_tasks=9
    )
    assert filled.replaced == ()
    assert filled.groups == kept.family


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_staleness": 2}, r"--rollout.max_staleness 2: cannot be combined with ProposedSpanObjective"),
        ({"pilot_size": 3}, r"--rollout.pilot_size 3: cannot be combined .* give --rollout.pilot_size null"),
        ({"selection": Selection(min_true_prob=0.1)}, "--rollout.selection: cannot be combined"),
    ],
)
def test_what_cannot_be_combined_is_refused(settings, says) -> None:
    defaults = {"pilot_size": None, "max_staleness": 0, "selection": Selection()}
    with pytest.raises(ValueError, match=says):
        check_follow_ups(ProposedSpanObjective(MaskedSpanObjective()), **(defaults | settings))
    check_follow_ups(ProposedSpanObjective(MaskedSpanObjective()), **defaults)
    check_follow_ups(NextTokenObjective(ContinuationPrompt(), PrefixMatchReward()), **(defaults | settings))
