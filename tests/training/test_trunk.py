"""The next-token term on a step's contexts, against next-token training and the plain computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule
from small_run import flat_weights, quiet_trainer
from test_module import GROUPS, TEMPERATURE, completion, group, train
from test_resume import check_resume

from rpt_lightning.data.modules.base import StepLoader
from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.data.modules.stream import TaskStream, rank_share
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.rows import pack_rows
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.training.modules.rpt_module import RPTModule
from rpt_lightning.training.modules.trunk import Span, context_sequences, first_target_positions
from rpt_lightning.types import TrainSequence


def on(doc_id, one, **changes):
    """The same group at a position of another document."""
    return replace(one, task=replace(one.task, doc_id=doc_id), **changes)


# Document "a" has positions 3 and 6. A completion of the first goes on like the document's own text, so the
# tokens 23 and 24 are targets of both terms, at two temperatures. Document "b" begins like "a".
A, B = (20, 21, 22, 23, 24, 25), (20, 21, 70, 71)
ALIVE = (
    on("a", group("a:3", A[:3], (completion(23, 24, 0), completion(30, 0)), (1.0, 0.0))),
    on("a", group("a:6", A, (completion(26, 0), completion(26, 27, 0)), (0.0, 1.0))),
    on("b", group("b:4", B, (completion(23, 0), completion(72, 0)), (0.0, 0.0))),
)
DEAD = tuple(replace(one, rewards=(0.0,) * len(one.rewards)) for one in ALIVE)
SEQUENCES = tuple(TrainSequence(prompt_ids=ids[:1], target_ids=ids[1:]) for ids in (A, B))
NUM_TARGETS = 8


class TheSequences(LightningDataModule):
    def train_dataloader(self):
        return StepLoader(lambda: SequenceBatch(sequences=SEQUENCES), num_steps=1)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def next_token_training(model_dir, tmp_path):
    module = NTPModule(
        Policy(str(model_dir)), lambda parameters: torch.optim.SGD(parameters, lr=1.0), gradient_clip=0.0
    )
    module.policy.materialize()
    before = flat_weights(module)
    trainer = quiet_trainer(tmp_path, 1, [], enable_checkpointing=False)
    trainer.fit(module, TheSequences())
    return module, before - flat_weights(module), trainer.callback_metrics["loss/total"].item()


@pytest.mark.parametrize("micro_batch_tokens", [1, 6, 1000])
def test_without_rewards_it_is_next_token_training(tiny_model_dir, tmp_path, micro_batch_tokens):
    plain, expected, loss = next_token_training(tiny_model_dir, tmp_path)
    assert expected.norm() > 0.05
    module, before, after, metrics = train(
        tiny_model_dir, tmp_path, groups=DEAD, ntp_weight=1.0, micro_batch_tokens=micro_batch_tokens
    )
    assert ((before - after) - expected).norm() / expected.norm() < 1e-6
    assert metrics["loss/ntp"] == pytest.approx(loss, rel=1e-6)
    assert metrics["loss/total"] == pytest.approx(loss, rel=1e-6)
    assert metrics["train/ntp_tokens"] == NUM_TARGETS
    assert metrics["train/live_completions"] == 0
    if micro_batch_tokens == 1000:
        assert module.trained_work == plain.trained_work


def test_it_has_its_weight(tiny_model_dir, tmp_path):
    _, expected, loss = next_token_training(tiny_model_dir, tmp_path)
    _, before, after, metrics = train(tiny_model_dir, tmp_path, groups=DEAD, ntp_weight=0.3)
    assert ((before - after) - 0.3 * expected).norm() / expected.norm() < 1e-6
    assert (metrics["loss/ntp"], metrics["loss/total"]) == pytest.approx((loss, 0.3 * loss), rel=1e-6)


def plain_gradient(model_dir, groups, contexts, weight, num_targets):
    """GRPO at the rollouts' temperature and the term at 1, one sequence at a time, with full logits.

    ``contexts`` are (all tokens, index of the first target).
    """
    policy = Policy(str(model_dir))
    policy.materialize()

    def logprobs(ids, first, temperature):
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids[first:])[:, None]).sum()

    total, num_tokens = torch.zeros(()), 0
    for one in groups:
        rewards = torch.tensor(one.rewards)
        for c, r in zip(one.completions, one.rewards, strict=True):
            advantage = (r - rewards.mean()) / (rewards.std() + 1e-6)
            total = total - advantage * logprobs(
                one.prompt_ids + c.token_ids, len(one.prompt_ids), TEMPERATURE
            )
            num_tokens += len(c.token_ids)
    ntp = -sum(logprobs(ids, first, 1.0) for ids, first in contexts) / num_targets
    (total / num_tokens + weight * ntp).backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("shares_prefixes", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [1, 6, 9, 1000])
def test_both_terms_are_the_plain_ones(
    tiny_model_dir, tmp_path, monkeypatch, micro_batch_tokens, shares_prefixes
):
    if not shares_prefixes:
        monkeypatch.setattr("rpt_lightning.policy.model.pack", pack_rows)
    expected = plain_gradient(tiny_model_dir, ALIVE, [(A, 1), (B, 1)], 0.5, NUM_TARGETS)
    grpo = plain_gradient(tiny_model_dir, ALIVE, [], 0.0, 1)
    assert (expected - grpo).norm() > 0.1 < grpo.norm()
    _, before, after, _ = train(
        tiny_model_dir, tmp_path, groups=ALIVE, ntp_weight=0.5, micro_batch_tokens=micro_batch_tokens
    )
    assert ((before - after) - expected).norm() / expected.norm() < 1e-5


def test_it_leaves_the_statistics_of_completions_alone(tiny_model_dir, tmp_path):
    _, _, _, without = train(tiny_model_dir, tmp_path, groups=GROUPS)
    _, _, _, metrics = train(tiny_model_dir, tmp_path, groups=GROUPS, ntp_weight=0.3)
    assert metrics.keys() - without.keys() == {"loss/ntp", "train/ntp_tokens"}
    of_completions = [
        name
        for name in without
        if name.startswith(("loss/ratio", "loss/approx", "correction/", "policy/"))
        or name in ("train/groups", "train/live_completions", "train/completion_tokens")
    ]
    assert len(of_completions) > 8
    for name in of_completions:
        assert metrics[name] == pytest.approx(without[name], rel=1e-5), name


def test_each_mini_batch_trains_the_contexts_of_its_own_groups(tiny_model_dir, tmp_path):
    _, before, after, metrics = train(
        tiny_model_dir,
        tmp_path,
        steps=2,
        lr=0.0,
        groups=(DEAD[2], DEAD[1], DEAD[0]),
        ntp_weight=1.0,
        optimizer_steps_per_batch=2,
    )
    assert torch.equal(before, after)
    # Document "a" is in both mini-batches. The last optimizer step has its first position alone.
    assert metrics["train/ntp_tokens"] == 2


# Inside a chat prompt

PREFIX, SUFFIX = (5, 6), (9,)


def in_chat(one):
    return replace(one, prompt_ids=PREFIX + one.task.context_ids + SUFFIX, num_prefix_tokens=len(PREFIX))


@pytest.mark.parametrize("in_prompt", [True, False])
def test_contexts_inside_a_prompt_or_by_themselves(tiny_model_dir, tmp_path, in_prompt):
    groups = tuple(map(in_chat, ALIVE))
    contexts = [(PREFIX + A, 3), (PREFIX + B, 3)] if in_prompt else [(A, 1), (B, 1)]
    expected = plain_gradient(tiny_model_dir, groups, contexts, 0.5, NUM_TARGETS)
    _, before, after, metrics = train(
        tiny_model_dir, tmp_path, groups=groups, ntp_weight=0.5, ntp_in_prompt=in_prompt
    )
    assert ((before - after) - expected).norm() / expected.norm() < 1e-5
    assert metrics["train/ntp_tokens"] == NUM_TARGETS
    # The completions alone take 15 tokens. Inside the prompts, 70 is the only further token that is fed. The
    # bare texts share nothing with the prompts: 20 to 24 and 70.
    assert metrics["train/packed_tokens"] == (16 if in_prompt else 21)


def test_a_prompt_that_does_not_hold_the_context_is_refused(tiny_model_dir, tmp_path):
    groups = tuple(replace(in_chat(one), num_prefix_tokens=1) for one in ALIVE)
    with pytest.raises(ValueError, match=r"model\.ntp_in_prompt=true: the prompt of a:6 does not hold"):
        train(tiny_model_dir, tmp_path, groups=groups, ntp_weight=0.5, ntp_in_prompt=True)


# Which contexts, and who trains them

spans = st.tuples(st.sampled_from("ab"), st.integers(0, 12), st.integers(0, 8)).map(
    lambda of: Span(of[0], of[1], of[1] + of[2])
)


@settings(max_examples=300, deadline=None)
@given(st.lists(spans, max_size=8))
def test_every_position_behind_a_first_token_is_a_target_once(contexts):
    wanted = {(span.doc_id, at) for span in contexts for at in range(span.start + 1, span.end)}
    trained = [
        (span.doc_id, at)
        for span, first in first_target_positions(contexts).items()
        for at in range(first, span.end)
    ]
    assert len(trained) == len(set(trained))
    assert set(trained) == wanted


def test_positions_of_a_whole_document_are_one_sequence():
    assert first_target_positions([Span("a", 0, 3), Span("a", 0, 6), Span("a", 0, 6)]) == {Span("a", 0, 6): 1}


class OneOfRanks:
    def __init__(self, groups, rank, num_ranks, max_tokens=None):
        self.data_rank = rank
        self.max_tokens = max_tokens
        self.parts = [rank_share(groups, rank=other, num_ranks=num_ranks) for other in range(num_ranks)]

    def gather(self, spans):
        of_parts = [[Span.of(one.task, max_tokens=self.max_tokens) for one in part] for part in self.parts]
        assert spans == of_parts[self.data_rank]
        return of_parts


def at(span):
    text = tuple(100 * (span.doc_id == "b") + place for place in range(30))
    one = group(f"{span.doc_id}:{span.end}", text[span.start : span.end], (completion(0),) * 2, (0.0, 0.0))
    return replace(one, task=replace(one.task, doc_id=span.doc_id, position=span.end))


@settings(max_examples=200, deadline=None)
@given(st.lists(spans, max_size=8), st.integers(1, 4))
def test_ranks_share_the_contexts_of_a_step(contexts, num_ranks):
    groups = tuple(map(at, contexts))
    shares = [
        context_sequences(part, start_ids=(7,), in_prompt=False, ranks=one)
        for rank in range(num_ranks)
        for one in [OneOfRanks(groups, rank, num_ranks)]
        for part in [one.parts[rank]]
    ]
    (alone,) = [context_sequences(groups, start_ids=(7,), in_prompt=False, ranks=OneOfRanks(groups, 0, 1))]
    sequences = [context.sequence for share in shares for context in share.sequences]
    assert sorted(map(repr, sequences)) == sorted(repr(context.sequence) for context in alone.sequences)
    assert {share.num_targets for share in shares} == {
        alone.num_targets,
        sum(len(sequence.target_ids) for sequence in sequences),
    }
    for sequence in sequences:
        assert sequence.prompt_ids[0] == 7
        assert len(sequence.prompt_ids) > 1  # a first token is no target


def test_a_resumed_run_is_exact(make_run, tmp_path):
    check_resume(make_run, tmp_path, 2, module_options={"micro_batch_tokens": 200, "ntp_weight": 0.3})


# Whole documents

WHOLE = {"ntp_weight": 0.3, "ntp_whole_documents": True}


def with_rest(one, document):
    return replace(one, task=replace(one.task, rest_ids=document[one.task.position :]))


def test_documents_are_trained_to_their_end(tiny_model_dir, tmp_path):
    documents = {"a": (*A, 26, 27), "b": (*B, 72)}
    groups = tuple(with_rest(one, documents[one.task.doc_id]) for one in ALIVE)
    expected = plain_gradient(tiny_model_dir, groups, [(ids, 1) for ids in documents.values()], 0.3, 11)
    _, before, after, metrics = train(tiny_model_dir, tmp_path, groups=groups, **WHOLE)
    assert ((before - after) - expected).norm() / expected.norm() < 1e-5
    assert metrics["train/ntp_tokens"] == 11  # 8 and 5 tokens, without the first ones


def test_documents_end_with_the_longest_input_of_the_model():
    (group_a,) = (with_rest(ALIVE[0], (*A, 26, 27)),)
    cut = context_sequences(
        (group_a,), start_ids=(7,), in_prompt=False, ranks=OneOfRanks((group_a,), 0, 1, 5), max_tokens=6
    )
    (sequence,) = cut.sequences
    assert sequence.sequence.prompt_ids + sequence.sequence.target_ids == (7, 20, 21, 22, 23, 24)
    assert cut.num_targets == 4


def test_all_documents_of_a_real_run_are_trained_whole(make_run):
    trainer, module, data = make_run(1, module_options=WHOLE)
    trainer.fit(module, data)
    lengths = {data.train.document(i)["doc_id"]: len(data.train.token_ids(i)) for i in range(len(data.train))}
    rng = data.stream.order
    first = TaskStream(rng, corpus="", layout="").next(8)
    documents = {document for document, _ in first}
    expected = sum(lengths[data.train.document(i)["doc_id"]] - 1 for i in documents)
    assert trainer.callback_metrics["train/ntp_tokens"] == expected


def test_a_resumed_run_on_whole_documents_is_exact(make_run, tmp_path):
    check_resume(make_run, tmp_path, 2, module_options={"micro_batch_tokens": 200} | WHOLE)


def test_a_task_without_the_rest_of_its_document_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"ntp_whole_documents=true: the data module hands out a:3 without"):
        train(tiny_model_dir, tmp_path, groups=ALIVE, **WHOLE)


@pytest.mark.parametrize("other", [{"ntp_weight": 0.0}, {"ntp_in_prompt": True}])
def test_whole_documents_need_a_term_on_bare_text(tiny_model_dir, other):
    with pytest.raises(ValueError, match=r"model\.ntp_whole_documents=true with model\.ntp_in_prompt="):
        RPTModule(Policy(str(tiny_model_dir)), **WHOLE | other)
