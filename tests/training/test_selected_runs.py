"""A run whose tasks the policy selects: by its own weights, at a counted cost, and not at all by default."""

from __future__ import annotations

import pytest
import torch
from async_run import rollout_of
from test_cost import Listener, log, trie_flops
from watched_run import Watch

from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.next_token import PLACES
from rpt_lightning.objectives.prompts.template import ChatPrompt
from rpt_lightning.objectives.thought_budget import ThoughtBudget
from rpt_lightning.policy.flops import forward_flops, model_size, train_flops
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.settings import EngineCheck, Selection
from rpt_lightning.training.callbacks.logs import StepLog
from rpt_lightning.types import TrainSequence

BAND = Selection(min_true_prob=0.0018, max_true_prob=0.0021, max_draws=6)  # near the tiny model's 1 / 512
UNCHECKED = EngineCheck(verify_sequences=0)


def stream_of(make_run):
    """The tasks of a run one by one, in the order in which they leave the stream."""
    _, _, data = make_run(1, data_options={"tasks_per_step": 1, "positions_per_document": 2})
    data.setup("fit")
    while True:
        yield from data.next_batch().tasks


def by_hand(stream, policy, *, places):
    """The tasks that are kept, and those that are scored in each round."""

    def true_prob(task):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([task.context_ids])).logits[0, -1]
        return logits.double().softmax(-1)[task.continuation_ids[0]].item()

    kept = [next(stream) for _ in range(places)]
    rounds, filled, num_left = [list(kept)], list(range(places)), (BAND.max_draws - 1) * places
    while True:
        probs = [true_prob(task) for task in rounds[-1]]
        outside = [place for place, p in zip(filled, probs, strict=True) if not 0.0018 <= p <= 0.0021]
        filled = outside[:num_left]
        if not filled:
            return kept, rounds
        num_left -= len(filled)
        rounds.append([next(stream) for _ in filled])
        for place, task in zip(filled, rounds[-1], strict=True):
            kept[place] = task


def test_the_weights_of_each_step_select_its_tasks(make_run, tiny_model_dir, tmp_path):
    watch = Watch()
    trainer, module, data = make_run(
        3,
        callbacks=[watch, StepLog()],
        run_dir=tmp_path / "run",
        rollout_options={"selection": BAND, "check": UNCHECKED},
    )
    trainer.fit(module, data)
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    stream = stream_of(make_run)
    num_outside = 0
    for step, (batch, line) in enumerate(zip(watch.batches, log(tmp_path / "run"), strict=True)):
        if step:
            torch.nn.utils.vector_to_parameters(watch.weights[step - 1], policy.parameters())
        kept, rounds = by_hand(stream, policy, places=8)
        assert [group.task.task_id for group in batch.groups] == [task.task_id for task in kept]
        drawn = sum(map(len, rounds))
        assert (line["selection/drawn"], line["selection/kept"]) == (drawn, 8)
        assert line["selection/in_band"] == 8 - line["selection/kept_outside"]
        assert line["selection/in_band_frac"] == pytest.approx(line["selection/in_band"] / drawn)
        assert line["selection/drawn_per_kept"] == pytest.approx(drawn / 8)
        assert line["time/selection_s"] > 0
        num_outside += len(rounds) > 1
    assert num_outside > 0  # some tasks were replaced
    # What a checkpoint would hold is the place behind all tasks that were scored.
    ahead = next(stream)
    assert data.next_batch().tasks[0].task_id == ahead.task_id


def test_the_pass_that_scores_tasks_is_part_of_the_cost(make_run, tmp_path):
    """Scored tokens and FLOPs of the first step: a causal pass over each round's contexts, prefixes once."""
    listener = Listener()
    trainer, module, data = make_run(
        1,
        callbacks=[StepLog(), listener],
        run_dir=tmp_path / "run",
        rollout_options={"selection": BAND, "check": UNCHECKED},
    )
    module.policy.materialize()
    _, rounds = by_hand(stream_of(make_run), module.policy, places=8)
    trainer.fit(module, data)
    assert len(rounds) > 1
    scored = [
        [TrainSequence(prompt_ids=t.context_ids, target_ids=t.continuation_ids[:1]) for t in tasks]
        for tasks in rounds
    ]
    size, (line,) = model_size(module.policy.model), log(tmp_path / "run")
    fed = [
        {s.prompt_ids[:length] for s in row for length in range(1, len(s.prompt_ids) + 1)} for row in scored
    ]
    assert line["cost/scored_tokens"] == sum(map(len, fed))
    selection = sum(trie_flops(size, row) for row in scored)
    assert forward_flops(size, module.scored_work) == pytest.approx(selection, rel=1e-9)
    others = forward_flops(size, module.generated_work) + train_flops(size, module.trained_work)
    assert line["cost/flops"] == pytest.approx(others + selection, rel=1e-6)


class InTheBox(Objective):
    """The next token, which without a thought stands in an open box behind the whole prompt."""

    places = PLACES

    def truth(self, task):
        return task.continuation[:1]


def test_a_prompt_that_states_a_budget_states_that_of_the_step(make_run, tmp_path):
    scored = []

    class Asks(InTheBox):
        def direct_sequence(self, task, bound):
            scored.append(super().direct_sequence(task, bound))
            return scored[-1]

    trainer, module, data = make_run(
        2,
        callbacks=[StepLog()],
        run_dir=tmp_path / "run",
        rollout_options={
            "selection": Selection(max_true_prob=0.5),
            "thought_budget": ThoughtBudget(initial=32, steps=2, decay=0.5),
            "max_prompt_tokens": 300,
        },
    )
    rollout_of(trainer).objective = Asks(ChatPrompt())
    trainer.fit(module, data)
    texts = [module.tokenizer.decode(list(sequence.prompt_ids)) for sequence in scored]
    assert len(texts) == 16
    assert all("in at most 32 tokens." in text for text in texts[:8])
    assert all("in at most 22 tokens." in text for text in texts[8:])  # 32 x 0.5^(1/2)


def test_by_default_nothing_is_scored(make_run, tmp_path):
    trainer, module, data = make_run(
        1, callbacks=[StepLog()], run_dir=tmp_path / "run", rollout_options={"check": UNCHECKED}
    )
    trainer.fit(module, data)
    (line,) = log(tmp_path / "run")
    assert line["cost/scored_tokens"] == 0
    assert not [name for name in line if "selection" in name]
