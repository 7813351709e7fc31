"""Compute golden losses and gradients with TRL's and verl's own code, on small seeded tensors.

The script writes trl.json and verl.json beside this file. Run it in an environment of its own, with torch and
`pip install trl==1.16.0 verl==0.9.1` (for verl, the imports of verl.trainer.ppo.core_algos are enough):

    python tests/algo/goldens/make_goldens.py

It imports nothing from rpt_lightning and repeats no formula. TRL's loss is `GRPOTrainer._compute_loss`, on a
trainer without a model that is given the log-probs. verl's functions are `compute_policy_loss_vanilla`,
`compute_grpo_outcome_advantage` and `compute_rollout_correction_weights`. The inputs are stored with the
results, so the tests do not depend on how a version of torch draws random numbers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).parent
N, T = 6, 7
MAX_TOKENS = 7
CLIPS = {"symmetric": (0.2, 0.2), "higher": (0.2, 0.28)}


def inputs(seed: int, *, with_empty_row: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, T + 1, (N,), generator=generator)
    if with_empty_row:
        lengths[2] = 0
    old = -normal(N, T).abs()
    return {
        "logprobs": old + 0.3 * normal(N, T),
        "old_logprobs": old,
        "rollout_logprobs": old + 0.3 * normal(N, T),
        "advantages": normal(N),
        "mask": (torch.arange(T) < lengths[:, None]).double(),
    }


def record(loss: torch.Tensor, logprobs: torch.Tensor) -> dict[str, object]:
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


def as_lists(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def trl_loss(
    batch: dict[str, torch.Tensor],
    logprobs: torch.Tensor,
    *,
    loss_type: str,
    clip: tuple[float, float],
    correction: torch.Tensor | None,
):
    from trl import GRPOTrainer

    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__ |= {
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(delta=None, steps_per_generation=1),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        "_metrics": {"train": defaultdict(list)},
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": loss_type,
        "epsilon_low": clip[0],
        "epsilon_high": clip[1],
        "use_vllm": correction is not None,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_TOKENS,
        "_entropy_bonus_enabled": False,
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    }
    ids = torch.zeros(N, T, dtype=torch.long)
    return trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": batch["mask"],
            "advantages": batch["advantages"],
            "old_per_token_logps": batch["old_logprobs"],
            "importance_sampling_ratio": correction,
            "num_items_in_batch": batch["mask"].sum(),
        },
    )


def make_trl() -> dict[str, object]:
    cases, stored = [], {}
    for seed, (clip_name, clip) in enumerate(CLIPS.items()):
        batch = inputs(seed, with_empty_row=False)
        stored[clip_name] = as_lists(batch)
        for loss_type in ("dapo", "grpo", "dr_grpo"):
            for corrected in (False, True):
                logprobs = batch["logprobs"].clone().requires_grad_()
                correction = (
                    (batch["old_logprobs"] - batch["rollout_logprobs"]).exp().clamp(max=1.5)
                    if corrected
                    else None
                )
                loss = trl_loss(batch, logprobs, loss_type=loss_type, clip=clip, correction=correction)
                cases.append(
                    {
                        "name": f"{loss_type}-{clip_name}{'-corrected' if corrected else ''}",
                        "loss_type": loss_type,
                        "clip": clip,
                        "correction": None if correction is None else correction.tolist(),
                        "inputs": clip_name,
                        **record(loss, logprobs),
                    }
                )
    return {"version": version("trl"), "max_tokens": MAX_TOKENS, "inputs": stored, "losses": cases}


def make_verl() -> dict[str, object]:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_policy_loss_vanilla
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
    from verl.workers.config import ActorConfig

    cases, stored = [], {}
    for seed, (clip_name, clip) in enumerate(CLIPS.items(), start=10):
        batch = inputs(seed, with_empty_row=True)
        stored[clip_name] = as_lists(batch)
        log_ratio = batch["old_logprobs"] - batch["rollout_logprobs"]
        weights, _ = compute_rollout_correction_weights(
            log_ratio, batch["mask"], rollout_is="token", rollout_is_threshold=1.5
        )
        for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            for corrected in (False, True):
                # The dual clip (on by default) is not in the papers that we follow, so it is set out of
                # reach.
                config = ActorConfig(
                    strategy="fsdp",
                    rollout_n=1,
                    ppo_micro_batch_size_per_gpu=1,
                    clip_ratio_low=clip[0],
                    clip_ratio_high=clip[1],
                    clip_ratio_c=1e9,
                )
                logprobs = batch["logprobs"].clone().requires_grad_()
                loss, metrics = compute_policy_loss_vanilla(
                    batch["old_logprobs"],
                    logprobs,
                    batch["advantages"][:, None].expand(N, T),
                    batch["mask"],
                    loss_agg_mode=mode,
                    config=config,
                    rollout_is_weights=weights if corrected else None,
                )
                cases.append(
                    {
                        "name": f"{mode}-{clip_name}{'-corrected' if corrected else ''}",
                        "mode": mode,
                        "clip": clip,
                        "cap": 1.5,
                        "correction": weights.tolist() if corrected else None,
                        "clipped_frac": metrics["actor/pg_clipfrac"],
                        "inputs": clip_name,
                        **record(loss, logprobs),
                    }
                )
    rewards = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1], [0.25, 0.5, 1, 0.1]], dtype=torch.float64)
    advantages = {}
    for scale, by_std in (("std", True), ("none", False)):
        values, _ = compute_grpo_outcome_advantage(
            rewards.reshape(-1, 1).clone(),
            torch.ones(12, 1),
            np.repeat(np.arange(3), 4),
            norm_adv_by_std_in_grpo=by_std,
        )
        advantages[scale] = values.reshape(3, 4).tolist()
    return {
        "version": version("verl"),
        "inputs": stored,
        "losses": cases,
        "rewards": rewards.tolist(),
        "advantages": advantages,
    }


if __name__ == "__main__":
    for name, make in (("trl", make_trl), ("verl", make_verl)):
        (HERE / f"{name}.json").write_text(json.dumps(make()) + "\n")
