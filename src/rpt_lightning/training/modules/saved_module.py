"""What a checkpoint says about the module that wrote it, beside weights and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpt_lightning.policy.model import Policy
from rpt_lightning.pretrained.specification import has_hash
from rpt_lightning.training.checkpoint.adapter import about_adapter, check_same_adapter
from rpt_lightning.training.checkpoint.reader import check_about

CHECKPOINT_KEY = "rpt"


def about_policy(policy: Policy, *, tokenizer_hash: str) -> dict[str, Any]:
    """Return the description of a policy that a checkpoint holds."""
    return {
        "policy_path": policy.path,
        "policy_config": policy.config.to_json_string(),
        "tokenizer_hash": tokenizer_hash,
        "weight_shapes": policy.saved_shapes(),
        **about_adapter(policy),
    }


def saved_entry(checkpoint: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """Return the entry of a checkpoint that describes its run.

    Raises:
        ValueError: The checkpoint is not of this package, is damaged, or holds another model than ``policy``.
    """
    saved: dict[str, Any] | None = checkpoint.get(CHECKPOINT_KEY)
    if saved is None:
        raise ValueError(
            "ckpt_path: this is not a checkpoint of rpt-lightning; give a file from a run folder's "
            "checkpoints/"
        )
    check_about(saved, "ckpt_path", resumes=True)
    check_same_adapter(saved, policy, "ckpt_path")
    # The checkpoint's "state_dict" is not available: a sharded strategy removes it before this call.
    if (
        not has_hash(policy.tokenizer, saved["tokenizer_hash"])
        or saved["weight_shapes"] != policy.saved_shapes()
    ):
        raise ValueError(
            f"ckpt_path: the checkpoint holds the model of {saved['policy_path']}, but the config has "
            f"model.policy.path={policy.path}, and their tokenizers or weight shapes differ; give "
            "the checkpoint's own model, or another checkpoint"
        )
    return saved
