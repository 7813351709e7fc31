"""Helpers that the tests of training share besides fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

# Frequent tokens of the tiny tokenizer's corpus, so that some completions are right. One completion has no
# answer, and one never ends in time.
SCRIPT = [
    *(f"?</think>\\boxed{{{token}}}" for token in (" ", "e", "t", "s", " the", "in", "a", "r", "o")),
    "no answer",
    "abcdefgh " * 20,
]


def quiet_trainer(run_dir: Path, max_steps: int, callbacks: list[Any], **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(default_root_dir=run_dir, max_steps=max_steps, callbacks=callbacks, **(defaults | options))


def flat_weights(module: LightningModule) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.policy.parameters()])
