"""NTPModule's optimizer step against torch's own cross-entropy, and a short cold start."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from small_run import flat_weights, quiet_trainer

from rpt_lightning.data.modules.base import StepLoader
from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.data.modules.traces import TraceDataModule
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.policy.model import Policy
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.types import TrainSequence

# Shared and separate prefixes, targets of uneven length, and one sequence twice.
SEQUENCES = tuple(
    TrainSequence(prompt_ids=prompt, target_ids=target)
    for prompt, target in [
        ((20, 21), (30, 31, 32)),
        ((20, 21), (30, 40)),
        ((50,), (51,)),
        ((20, 21, 22, 23), (60,) * 5),
        ((50,), (51,)),
    ]
)


class OneBatch(LightningDataModule):
    def train_dataloader(self):
        return StepLoader(lambda: SequenceBatch(sequences=tuple(SEQUENCES)), num_steps=100)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


@pytest.mark.parametrize("micro_batch_tokens", [1, 9, 1000])
def test_loss_and_gradient_are_cross_entropy(tiny_model_dir, tmp_path, micro_batch_tokens):
    module = NTPModule(
        Policy(str(tiny_model_dir)),
        lambda parameters: torch.optim.SGD(
            parameters, lr=1.0
        ),  # the difference of the weights is the gradient
        gradient_clip=0.0,
        micro_batch_tokens=micro_batch_tokens,
    )
    module.policy.materialize()
    before = flat_weights(module)
    trainer = quiet_trainer(tmp_path, 1, [], enable_checkpointing=False)
    trainer.fit(module, OneBatch())
    gradient = before - flat_weights(module)

    policy = Policy(str(tiny_model_dir))
    policy.materialize()
    losses = []
    for sequence in SEQUENCES:
        logits = policy.model(input_ids=torch.tensor([sequence.prompt_ids + sequence.target_ids])).logits[
            0, len(sequence.prompt_ids) - 1 : -1
        ]
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(sequence.target_ids), reduction="sum")
        )
    loss = torch.stack(losses).sum() / 12  # 3 + 2 + 1 + 5 + 1 target tokens
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert trainer.callback_metrics["loss/total"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.callback_metrics["train/target_tokens"] == 12
    assert (trainer.callback_metrics["train/micro_batches"] > 1) == (micro_batch_tokens < 1000)
    assert expected.norm() > 0.05
    assert (gradient - expected).norm() / expected.norm() < 1e-4


def test_a_cold_start_learns_the_form_of_its_traces(tiny_model_dir, tiny_task_dir, tmp_path):
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(trainer.callback_metrics["loss/total"].item())

    module = NTPModule(
        Policy(str(tiny_model_dir)),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        gradient_clip=1.0,
    )
    data = TraceDataModule(
        str(tiny_task_dir),
        ContinuationPrompt(),
        traces_per_step=8,
        positions_per_document=4,
        max_context_tokens=16,
    )
    quiet_trainer(tmp_path, 10, [Watch()], enable_checkpointing=False).fit(module, data)
    assert len(losses) == 10
    assert losses[0] == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=1.0)  # random weights
    assert losses[-1] < losses[0] - 1.0
