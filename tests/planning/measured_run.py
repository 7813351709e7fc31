"""Train a model for two real steps in this process and print the peak memory and the tokens.

The memory of the interpreter and its libraries is not counted.

python measured_run.py MODEL_DIR RUN_DIR '{"precision": ..., ...}'
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback

from rpt_lightning.data.modules.base import StepLoader
from rpt_lightning.data.modules.batch import TaskBatch
from rpt_lightning.policy.model import Policy
from rpt_lightning.training.modules.rpt_module import RPTModule
from rpt_lightning.types import Completion, RolloutGroup, SamplingSettings, TokenTask, TrainBatch


def peak_rss_bytes() -> int:
    """Return the peak of this program. getrusage's would include the program that started it."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def group(index: int, *, prompt_tokens: int, completion_tokens: int, group_size: int) -> RolloutGroup:
    """Make a group of random tokens with one right answer."""
    generator = torch.Generator().manual_seed(index)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 500, (number,), generator=generator).tolist())

    prompt = tokens(prompt_tokens)
    task = TokenTask(
        task_id=f"d{index}:{prompt_tokens}", doc_id=f"d{index}", position=prompt_tokens, context_ids=prompt,
        continuation_ids=(1,), continuation=(b"x",),
        entropy=1.0, true_prob=0.5, true_rank=0, answerable=True,
    )  # fmt: skip
    completions = tuple(
        Completion(
            token_ids=tokens(completion_tokens),
            text_bytes=b"",
            rollout_logprobs=(-1.0,) * completion_tokens,
            policy_version=0,
            finish_reason="stop",
        )
        for _ in range(group_size)
    )
    rewards = (1.0,) + (0.0,) * (group_size - 1)
    return RolloutGroup(
        task=task,
        prompt_ids=prompt,
        completions=completions,
        predictions=(None,) * group_size,
        rewards=rewards,
    )


class SameStep(LightningDataModule):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def train_dataloader(self):
        return StepLoader(lambda: replace(self.batch), num_steps=2)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


class KeepMetrics(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def main() -> None:
    model_dir, run_dir, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    shape = {name: options[name] for name in ("prompt_tokens", "completion_tokens", "group_size")}
    sampling = SamplingSettings(temperature=1.0, max_tokens=options["completion_tokens"], stop_token_ids=(0,))
    groups = tuple(group(i, **shape) for i in range(options["tasks"]))
    batch = TaskBatch(rollouts=TrainBatch(groups=groups, sampling=sampling))
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the first product loads libraries
    before = peak_rss_bytes()
    policy = Policy(model_dir, activation_checkpointing=options["checkpointing"])
    module = RPTModule(
        policy,
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        micro_batch_tokens=options["micro_batch_tokens"],
    )
    metrics = KeepMetrics()
    trainer = Trainer(
        default_root_dir=run_dir, accelerator="cpu", devices=1, max_steps=2, precision=options["precision"],
        logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[metrics],
    )  # fmt: skip
    trainer.fit(module, SameStep(batch))
    tokens = {
        name: metrics.metrics[f"train/{name}"] for name in ("packed_tokens", "plain_tokens", "micro_batches")
    }
    print(json.dumps({"peak_bytes": peak_rss_bytes() - before, **tokens}))


if __name__ == "__main__":
    main()
