"""Flags whose numbers are out of bounds, NaN among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rpt_lightning.rollout.settings import DynamicSampling, EngineCheck, Evaluation, Sampling, Selection
from rpt_lightning.training.callbacks.health import Health
from rpt_lightning.training.callbacks.logs import RolloutSamples
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.reader import check_about

NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "flag", "value"),
    [
        *((EngineCheck, "verify_sequences", value) for value in (-1, -4)),
        *((EngineCheck, "logprob_tolerance", value) for value in (0.0, -1.0, NAN)),
        *((Sampling, "top_p", value) for value in (0.0, 1.5, -0.1, NAN)),
        *((Sampling, "min_p", value) for value in (-0.1, 1.0, NAN)),
        *((Sampling, name, -1) for name in ("top_k", "temperature")),
        (RolloutCallback, "max_prompt_tokens", -1),
        (DynamicSampling, "from_step", -1),
        (Evaluation, "samples", -1),
        (Sampling, "max_completion_tokens", 0),
        (Sampling, "temperature", NAN),
        (DynamicSampling, "max_factor", NAN),
        *((Selection, "min_true_prob", value) for value in (-0.1, 1.0, NAN)),
        *((Selection, "max_true_prob", value) for value in (0.0, 1.1, NAN)),
        *((Selection, "max_draws", value) for value in (1, 0)),
        *((Selection, name, value) for name in ("kind_floor", "kind_decay") for value in (0.0, 1.5, NAN)),
        (RolloutSamples, "num_samples", -1),
        *((RolloutSamples, "every_n_steps", value) for value in (0, -10)),
        (Health, "min_entropy", -0.1),
        (Health, "min_entropy", NAN),
        (Health, "max_truncated", NAN),
    ],
)
def test_flags(make: Any, flag: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"\.{flag}={value}: "):
        make(**{flag: value})


def test_a_band_that_holds_nothing() -> None:
    with pytest.raises(
        ValueError,
        match=r"selection\.min_true_prob=0\.8: must be below rollout\.selection\.max_true_prob=0\.2",
    ):
        Selection(min_true_prob=0.8, max_true_prob=0.2)


def test_a_module_refuses_negative_numbers(tiny_model_dir: Any) -> None:
    from rpt_lightning.policy.model import Policy
    from rpt_lightning.training.modules.rpt_module import RPTModule

    policy = Policy(str(tiny_model_dir))
    flags = {"max_skipped_steps": -1, "gradient_clip": NAN, "correction_cap": NAN, "clip_high": NAN}
    flags |= {"ntp_weight": -0.1}
    for flag, value in flags.items():
        with pytest.raises(ValueError, match=rf"model\.{flag}={value}: "):
            RPTModule(policy, **{flag: value})  # type: ignore[arg-type]
    for floor, correction in ((0.5, "truncate"), (0.5, "none"), (1.5, "mask"), (0.0, "mask"), (NAN, "mask")):
        with pytest.raises(
            ValueError, match=rf"model\.correction_floor={floor}, model\.correction={correction}"
        ):
            RPTModule(policy, correction=correction, correction_floor=floor)  # type: ignore[arg-type]


GOOD: dict[str, Any] = {
    "policy_path": "m",
    "policy_config": '{"model_type": "llama"}',
    "tokenizer_hash": "0" * 16,
    "weight_shapes": {},
    "global_step": 3,
    "num_skipped_steps": 0,
    "skipped_in_a_row": 0,
}


def test_what_a_checkpoint_must_say_of_its_policy() -> None:
    check_about(GOOD, "--ckpt x", resumes=True)
    for name in GOOD:
        with pytest.raises(ValueError, match=rf"--ckpt x: its entry 'rpt\.{name}' is missing"):
            check_about({key: value for key, value in GOOD.items() if key != name}, "--ckpt x", resumes=True)
        with pytest.raises(ValueError, match=rf"--ckpt x: its entry 'rpt\.{name}' is a Tensor"):
            check_about(GOOD | {name: torch.zeros(1)}, "--ckpt x", resumes=True)
    check_about({name: GOOD[name] for name in ("policy_path", "policy_config", "tokenizer_hash")}, "--ckpt x")
    for about in (None, [], "text"):
        with pytest.raises(ValueError, match=r"--ckpt x: not a checkpoint of `rpt fit`"):
            check_about(about, "--ckpt x")
    for config in ("{", "[]", "{}"):
        with pytest.raises(ValueError, match=r"'rpt\.policy_config'"):
            check_about(GOOD | {"policy_config": config}, "--ckpt x")
