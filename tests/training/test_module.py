"""RPTModule's optimizer step against the plain computation.

The plain computation takes one sequence at a time, with full logits and the formulas written out.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import LambdaCallback
from small_run import flat_weights, quiet_trainer

from rpt_lightning.data.modules.base import StepLoader
from rpt_lightning.data.modules.batch import TaskBatch
from rpt_lightning.data.modules.stream import rank_share
from rpt_lightning.policy.model import Policy
from rpt_lightning.training.checkpoint.callback import RunCheckpoint
from rpt_lightning.training.modules.rpt_module import RPTModule, mini_batches_of
from rpt_lightning.types import Completion, RolloutGroup, SamplingSettings, TokenTask, TrainBatch

TEMPERATURE = 0.7
SAMPLING = SamplingSettings(temperature=TEMPERATURE, max_tokens=9, stop_token_ids=(0,))


def completion(*token_ids, reason="stop", logprob=-1.0):
    return Completion(
        token_ids=token_ids,
        text_bytes=b"",
        rollout_logprobs=(logprob,) * len(token_ids),
        policy_version=0,
        finish_reason=reason,
    )


def group(name, prompt, completions, rewards):
    task = TokenTask(
        task_id=name, doc_id=name, position=len(prompt), context_ids=prompt, continuation_ids=(5,),
        continuation=(b"x",), entropy=1.0,
        true_prob=0.1, true_rank=3, answerable=True,
    )  # fmt: skip
    return RolloutGroup(
        task=task,
        prompt_ids=prompt,
        completions=completions,
        predictions=(None,) * len(rewards),
        rewards=rewards,
    )


# Uneven lengths, a shared document, a zero-variance group (which only counts in the normalizer) and a
# truncated completion.
GROUPS = (
    group(
        "a",
        (20, 21, 22),
        (completion(30, 31, 0), completion(30, 32, 33, 34, 0), completion(40, 0)),
        (1.0, 0.0, 0.0),
    ),
    group(
        "b",
        (20, 21, 22, 23),
        (completion(50, 51, 0), completion(52, 0), completion(53, 54, 55, 56, 57, 58, reason="length")),
        (1.0, 1.0, 0.0),
    ),
    group("dead", (60, 61), (completion(62, 0), completion(63, 0), completion(64, 65, 0)), (0.0, 0.0, 0.0)),
)


class OneBatch(LightningDataModule):
    """Serves the same rollouts repeatedly, as if the rollout callback had made them."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def train_dataloader(self):
        return StepLoader(
            lambda: TaskBatch(rollouts=TrainBatch(groups=self.groups, sampling=SAMPLING)), num_steps=100
        )

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def train(model_dir, tmp_path, *, steps=1, lr=1.0, groups=GROUPS, **options):
    """The weights before and after plain SGD steps. With lr 1 their difference is the gradient."""
    module = RPTModule(
        Policy(str(model_dir)),
        lambda parameters: torch.optim.SGD(parameters, lr=lr),
        **({"gradient_clip": 0.0} | options),
    )
    module.policy.materialize()
    before = flat_weights(module)
    trainer = quiet_trainer(tmp_path, steps, [], enable_checkpointing=False)
    trainer.fit(module, OneBatch(groups))
    return (
        module,
        before,
        flat_weights(module),
        {name: value.item() for name, value in trainer.callback_metrics.items()},
    )


def logprobs_alone(model, prompt, token_ids):
    logits = model(input_ids=torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def reference_gradient(model_dir, aggregation="token_mean", scale="std", masked=False):
    policy = Policy(str(model_dir))
    policy.materialize()
    kept = [
        (
            g.prompt_ids,
            c.token_ids,
            (r - rewards.mean()) / ((rewards.std() + 1e-6) if scale == "std" else 1.0),
        )
        for g in GROUPS
        for members in [
            [(c, r) for c, r in zip(g.completions, g.rewards, strict=True) if not (masked and c.is_truncated)]
        ]
        for rewards in [torch.tensor([r for _, r in members])]
        for c, r in members
    ]
    total = torch.zeros(())
    for prompt, token_ids, advantage in kept:
        logprobs = logprobs_alone(policy.model, prompt, token_ids)
        total = total - advantage * (logprobs.mean() if aggregation == "sequence_mean" else logprobs.sum())
    denominator = {
        "token_mean": sum(len(ids) for _, ids, _ in kept),
        "sequence_mean": len(kept),
        "constant": len(kept) * SAMPLING.max_tokens,
    }
    (total / denominator[aggregation]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("micro_batch_tokens", [1, 8, 1000])
@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, {}),
        ({"aggregation": "sequence_mean"}, {"aggregation": "sequence_mean"}),
        (
            {"aggregation": "constant", "advantage_scale": "none"},
            {"aggregation": "constant", "scale": "none"},
        ),
        ({"truncated": "mask"}, {"masked": True}),
    ],
)
def test_gradient_is_the_plain_one(tiny_model_dir, tmp_path, options, reference, micro_batch_tokens):
    _, before, after, _ = train(tiny_model_dir, tmp_path, micro_batch_tokens=micro_batch_tokens, **options)
    expected = reference_gradient(tiny_model_dir, **reference)
    assert expected.norm() > 0.05
    assert (before - after - expected).norm() / expected.norm() < 1e-4


def test_gradient_clip_bounds_the_global_norm(tiny_model_dir, tmp_path):
    _, before, after, metrics = train(tiny_model_dir, tmp_path, gradient_clip=0.01, micro_batch_tokens=8)
    assert (before - after).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert metrics["optim/grad_norm"] == pytest.approx(
        reference_gradient(tiny_model_dir).norm().item(), rel=1e-3
    )


def test_on_policy_ratio_is_one_and_loss_is_minus_mean_advantage(tiny_model_dir, tmp_path):
    _, _, _, metrics = train(tiny_model_dir, tmp_path)
    assert metrics["loss/ratio_mean"] == metrics["loss/ratio_max"] == 1.0
    assert metrics["loss/ratio_clipped_frac"] == 0.0
    # Group a: rewards 1, 0, 0 -> advantages 1.1547, -0.57735 (twice) on 3, 5 and 2 tokens. Group b: 0.57735
    # on 3 and 2 tokens, -1.1547 on 6.
    advantage_sum = 1.1547 * 3 - 0.57735 * 7 + 0.57735 * 5 - 1.1547 * 6
    assert metrics["loss/total"] == pytest.approx(
        -advantage_sum / 28, abs=1e-4
    )  # 10 + 11 + 7 tokens, including those of the zero-variance group


class OneOfRanks:
    """A rank among others, each with its part of a step."""

    def __init__(self, step, rank, num_ranks):
        self.data_rank, self.num_data = rank, num_ranks
        self.parts = [rank_share(step, rank=other, num_ranks=num_ranks) for other in range(num_ranks)]

    def gather(self, value):
        assert value == self.parts[self.data_rank]
        return self.parts


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (3, 2, 3), (2, 3), (2, 1, 2), (0, 1, 0)])
def test_mini_batches_do_not_depend_on_the_number_of_ranks(sizes):
    step = tuple(
        group(str(place), (20,), (completion(place, 0), completion(0)), (1.0, 0.0))
        for place in range(sum(sizes))
    )
    expected = [step[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    for num_ranks in (1, 2, 3, 9):
        ranks = [OneOfRanks(step, rank, num_ranks) for rank in range(num_ranks)]
        shares = [mini_batches_of(one.parts[one.data_rank], len(sizes), one) for one in ranks]
        for mini_batch, of_ranks in zip(expected, zip(*shares, strict=True), strict=True):
            assert tuple(one for share in of_ranks for one in share) == mini_batch
            assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1  # no rank waits for another's work


def test_second_optimizer_step_of_a_batch_sees_the_ratio(tiny_model_dir, tmp_path):
    """There are two mini-batches with the same group.

    The second is compared with the log-probs from before the first.
    """
    groups = (GROUPS[0], GROUPS[0])
    _, before, after, metrics = train(
        tiny_model_dir,
        tmp_path,
        steps=2,
        lr=0.05,
        groups=groups,
        optimizer_steps_per_batch=2,
        clip_low=1.0,
        clip_high=9.0,
    )
    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    rewards = torch.tensor(GROUPS[0].rewards)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    old = [
        logprobs_alone(policy.model, GROUPS[0].prompt_ids, c.token_ids).detach()
        for c in GROUPS[0].completions
    ]
    for _ in range(2):
        policy.zero_grad()
        ratios = [
            (logprobs_alone(policy.model, GROUPS[0].prompt_ids, c.token_ids) - o).exp()
            for c, o in zip(GROUPS[0].completions, old, strict=True)
        ]
        (-sum((ratio * a).sum() for ratio, a in zip(ratios, advantages, strict=True)) / 10).backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= 0.05 * parameter.grad
    expected = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    assert (after - expected).norm() / (after - before).norm() < 1e-3
    assert metrics["loss/ratio_max"] > 1.001


def test_second_optimizer_step_of_a_batch_sees_the_new_weights_under_autocast(tiny_model_dir, tmp_path):
    """torch's autocast would keep its bf16 copies of the weights, since it knows nothing of the optimizer.

    Lightning's does not keep them.
    """
    calls = []

    class Recorded(Policy):
        def forward(self, tree, **options):
            logprobs, entropy = super().forward(tree, **options)
            if torch.is_grad_enabled():
                calls.append(
                    (
                        tree,
                        {name: weight.clone() for name, weight in self.state_dict().items()},
                        logprobs.detach(),
                    )
                )
            return logprobs, entropy

    module = RPTModule(
        Recorded(str(tiny_model_dir)),
        lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        optimizer_steps_per_batch=2,
    )
    quiet_trainer(tmp_path, 2, [], enable_checkpointing=False, precision="bf16-mixed").fit(
        module, OneBatch((GROUPS[0], GROUPS[0]))
    )
    first, second = calls
    assert not torch.equal(first[2], second[2])
    for tree, weights, logprobs in calls:
        policy = Policy(str(tiny_model_dir))
        policy.materialize()
        policy.load_state_dict(weights)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(policy(tree, temperature=TEMPERATURE)[0], logprobs)


def test_groups_without_any_difference_give_a_zero_gradient_step(tiny_model_dir, tmp_path):
    _, before, after, metrics = train(tiny_model_dir, tmp_path, groups=GROUPS[2:])
    assert torch.equal(before, after)
    assert metrics["train/live_completions"] == 0
    assert metrics["optim/grad_norm"] == 0
    assert metrics["optim/skipped_steps"] == 0


@pytest.mark.parametrize(
    ("options", "groups", "tokens"),
    [({}, 2, 21), ({"truncated": "mask"}, 1, 10), ({"optimizer_steps_per_batch": 3}, 2, 21)],
)
def test_groups_that_are_trained_are_counted(tiny_model_dir, tmp_path, options, groups, tokens):
    """Without its truncated completion group b has equal rewards."""
    metrics = train(tiny_model_dir, tmp_path, steps=options.get("optimizer_steps_per_batch", 1), **options)[3]
    assert (metrics["train/groups"], metrics["train/completion_tokens"]) == (groups, tokens)


def test_non_finite_steps_are_skipped_counted_and_stop_the_run(tiny_model_dir, tmp_path):
    class Broken(Policy):
        calls = 0

        def forward(self, tree, **options):
            logprobs, entropy = super().forward(tree, **options)
            Broken.calls += torch.is_grad_enabled()  # not when the model is checked at loading
            return (logprobs * float("nan") if Broken.calls in (2, 4, 5, 6) else logprobs), entropy

    module = RPTModule(
        Broken(str(tiny_model_dir)),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        max_skipped_steps=3,
    )
    weights = []
    watch = LambdaCallback(on_train_batch_end=lambda *_: weights.append(flat_weights(module)))
    trainer = quiet_trainer(tmp_path, 10, [watch, RunCheckpoint(every_n_steps=100)])
    with pytest.raises(RuntimeError, match="3 steps in a row were not finite"):
        trainer.fit(module, OneBatch(GROUPS))
    # What stops a run at a step saves a checkpoint first, and its weights are finite.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000006.ckpt"]
    saved = torch.load(tmp_path / "checkpoints" / "step-000006.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
    assert torch.equal(weights[0], weights[1])  # step 2 was skipped: weights and moments are unchanged
    assert not torch.equal(weights[1], weights[2])
    assert len(weights) == 6
    assert torch.equal(weights[2], weights[5])
    assert module.skipped_steps.number == 4
    assert torch.isfinite(flat_weights(module)).all()
