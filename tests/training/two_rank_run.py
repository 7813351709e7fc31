"""Run by test_ranks.py in processes of its own: two steps of training, then a validation of the checkpoint. Arguments: folder, model, tasks, ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from small_run import quiet_trainer

from rpt_lightning.data.trace_datamodule import TraceDataModule
from rpt_lightning.policy.model import Policy
from rpt_lightning.tasks.prompt import ContinuationPrompt
from rpt_lightning.training.checkpoint import RunCheckpoint, last_checkpoint
from rpt_lightning.training.monitors import ValidationResults
from rpt_lightning.training.ntp_module import NTPModule


def parts(folder: Path, model: str, tasks: str, num_ranks: int):
    module = NTPModule(Policy(model), lambda parameters: torch.optim.SGD(parameters, lr=0.1), micro_batch_tokens=64)
    # 13 held-out tasks in batches of 6: the second rank has nothing in the last batch.
    data = TraceDataModule(tasks, ContinuationPrompt(), traces_per_step=8, positions_per_document=4, num_eval_tasks=13, eval_batch_size=6)
    strategy = ModelParallelStrategy(data_parallel_size=num_ranks, tensor_parallel_size=1) if num_ranks > 1 else "auto"
    callbacks = [RunCheckpoint(), ValidationResults()]
    return quiet_trainer(folder, 2, callbacks, devices=num_ranks, strategy=strategy, limit_val_batches=1.0), module, data


if __name__ == "__main__":
    folder, model, tasks, num_ranks = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    trainer, module, data = parts(folder, model, tasks, num_ranks)
    trainer.fit(module, data)
    trainer, module, data = parts(folder / "validate", model, tasks, num_ranks)
    trainer.validate(module, data, ckpt_path=str(last_checkpoint(folder)), weights_only=True, verbose=False)
