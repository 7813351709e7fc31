"""Decides who is right when engine and policy seem to disagree.

The witness is transformers itself, which scores the same tokens with the policy's weights in fp32. Only what
more tokens show against that witness ends a run, and each side is judged by the limits of its own dtype. So
the rounding of both sides together, which the first comparison saw, ends nothing. The error says which of
three is wrong:

- the engine: transformers agrees with the policy but not with the engine;
- the policy: transformers agrees with the engine, or it agrees with neither and less with the policy. The
  policy's own way of computing is wrong for this model;
- the folder: its files and its config.json describe two different models, so the policy (built from both) and
  the engine (built from config.json) cannot agree. Or it holds weights that are not numbers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from rpt_lightning.compat.transformers import READING_ENTRIES
from rpt_lightning.policy.adapter import base_parameters
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.transformers_logprobs import plain_logprobs
from rpt_lightning.training.engine_check.logprob_diff import (
    CAP,
    LogprobDiff,
    LogprobLimits,
    exceeded,
    logprob_limits,
)
from rpt_lightning.training.engine_check.logprob_samples import Sample, drawn_tokens, score_samples
from rpt_lightning.training.engine_check.sync_check import Culprit, SyncError
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.types import TrainSequence

# Most tokens scored in one completion. Their logits exist at the same time.
TOKENS_OF_A_COMPLETION = 256


@dataclass(frozen=True)
class CloserLook:
    """Log-probs of the same tokens of this rank, each [N] in fp64.

    ``plain`` is None if transformers could not score them, and ``reason`` says why.
    """

    engine: Tensor
    policy: Tensor
    plain: Tensor | None
    policy_dtype: torch.dtype
    plain_dtype: torch.dtype = torch.float32
    reason: str = ""

    @classmethod
    def at(
        cls,
        trainer: Trainer,
        module: PolicyModule,
        samples: Sequence[Sample],
        *,
        temperature: float,
        seed: int,
    ) -> CloserLook:
        """Compute all three. A collective."""
        scored, policy_dtype = score_samples(trainer, module, samples, temperature=temperature)
        lengths = [len(sample.completion.token_ids) for sample in samples]
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        broken = ~(scored.engine.isfinite() & scored.policy.isfinite())  # always scored
        places = [
            torch.cat(
                [
                    drawn_tokens(length, TOKENS_OF_A_COMPLETION, seed=(seed, index)),
                    broken[start : start + length].nonzero()[:, 0],
                ]
            ).unique()  # type: ignore[no-untyped-call]
            for index, (start, length) in enumerate(zip(starts, lengths, strict=False))
        ]
        kept = torch.cat(
            [
                torch.empty(0, dtype=torch.int64),
                *(start + place for start, place in zip(starts, places, strict=False)),
            ]
        )
        engine, policy = scored.engine[kept], scored.policy[kept]
        if module.ranks.num_tensor > 1:  # no single module holds the whole head
            return cls(engine, policy, None, policy_dtype, reason="the policy is tensor-parallel")
        rows: list[Tensor] = []
        try:
            for index in range(int(module.ranks.max(len(samples)))):
                own = index < len(samples)  # else this rank only takes part in gathering the weights
                sequence = samples[index].sequence if own else TrainSequence(prompt_ids=(0,), target_ids=(0,))
                place = places[index] if own else torch.tensor([0])
                rows += [
                    plain_logprobs(
                        module.policy, sequence, place, temperature=temperature, device=module.device
                    )
                ][: int(own)]
        except Exception as error:  # a model's own code may raise anything; it must not hide the question
            return cls(engine, policy, None, policy_dtype, reason=f"{type(error).__name__}: {error}")
        dtype = rows[0].dtype if rows else torch.float32
        return cls(
            engine,
            policy,
            torch.cat([torch.empty(0, dtype=torch.float64), *(row.double().cpu() for row in rows)]),
            policy_dtype,
            dtype,
        )

    def error(self, module: PolicyModule, *, engine_dtype: torch.dtype, tolerance: float) -> SyncError | None:
        """The error that names what is wrong of the three, or None if all is well. Of this rank alone."""
        if self.engine.numel() == 0:
            return None
        start = f"version {module.policy_version}: log-probs of engine and policy differ too much, in nats"
        if not self.policy.isfinite().all():
            return _not_finite(module)
        own_limits = logprob_limits(engine_dtype, self.policy_dtype).times(tolerance)
        if self.plain is None:
            over = exceeded(_diff(self.engine, self.policy), own_limits)
            if not over:
                return None
            return SyncError(
                f"{start}: {', '.join(over)}. It is unknown which of them is wrong, since transformers could "
                f"not be asked ({self.reason}). {_ENGINE}"
            )
        of_engine, engine_limits = (
            _diff(self.engine, self.plain),
            logprob_limits(engine_dtype, self.plain_dtype).times(tolerance),
        )
        of_policy, policy_limits = (
            _diff(self.policy, self.plain),
            logprob_limits(self.policy_dtype, self.plain_dtype).times(tolerance),
        )
        engine_over, policy_over = exceeded(of_engine, engine_limits), exceeded(of_policy, policy_limits)
        if not engine_over and not policy_over:
            return None
        is_policy = not engine_over or (
            policy_over and _excess(of_policy, policy_limits) > _excess(of_engine, engine_limits)
        )
        culprit: Culprit = "policy" if is_policy else "engine"
        facts = (
            f"compared with transformers' own log-probs of the policy's weights "
            f"({str(self.plain_dtype).removeprefix('torch.')}, {of_engine.num_tokens} tokens) "
            f"the engine's differ by {of_engine.mean:.2g} in the mean, the policy's by {of_policy.mean:.2g}"
        )
        exceeded_limits = ", ".join(policy_over if culprit == "policy" else engine_over)
        contradiction = folder_contradiction(module.policy)
        if contradiction is not None:
            return SyncError(
                f"{start}: {exceeded_limits}; {facts}. The folder is what is wrong: {contradiction}",
                culprit="folder",
            )
        return SyncError(
            f"{start}: {exceeded_limits}; {facts}. {_POLICY if culprit == 'policy' else _ENGINE}",
            culprit=culprit,
        )

    def summary(self) -> str:
        """Mean differences from transformers' own log-probs, on this rank."""
        if self.engine.numel() == 0:
            return "on another rank"
        if self.plain is None:
            return f"not asked: {self.reason}"
        of_engine, of_policy = _diff(self.engine, self.plain), _diff(self.policy, self.plain)
        return (
            f"{of_engine.num_tokens} tokens, mean difference of the engine {of_engine.mean:.2g} nats, "
            f"of the policy {of_policy.mean:.2g}"
        )


_ENGINE = (
    "The engine is wrong: it computes with other weights, another temperature or a stale cache. Or "
    "rollout.check.logprob_tolerance is too small for this model: raise it only after looking"
)
_POLICY = (
    "The policy is wrong: this package's own way of computing gives this model other log-probs than "
    "transformers does, so the model must not be trained with it; use a model of the Llama, Qwen2 or Qwen3 "
    "family, and report this one"
)


def folder_contradiction(policy: Policy) -> str | None:
    """How the model loaded from the folder differs from the one that its config.json describes.

    Engines build their model from config.json. None if the two agree.
    """
    path = policy.model_path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=policy.trust_remote_code)
    except (OSError, ValueError) as error:
        return (
            f"{path}: its config.json, which was read at the start of the run, cannot be read any more: "
            f"{error}"
        )
    loaded, now = _said(policy.config), _said(config)
    changed = sorted(name for name in loaded.keys() | now.keys() if loaded.get(name) != now.get(name))
    if changed:
        return (
            f"{path}: its config.json was changed after the policy was loaded ({', '.join(changed[:3])}); "
            "put it back, or start the run again"
        )
    with init_empty_weights(include_buffers=False):
        model = cast(Any, AutoModelForCausalLM).from_config(
            config, trust_remote_code=policy.trust_remote_code
        )
    model.tie_weights()
    described, held = (
        _shared_names(model.named_parameters(remove_duplicate=False)),
        _shared_names(base_parameters(policy.model, remove_duplicate=False)),
    )
    names, held_names = set().union(*described), set().union(*held)
    if other := sorted(names ^ held_names):
        whose = "config.json" if other[0] in names else "weights"
        return (
            f"{path}: only its {whose} know of {other[0]} ({len(other)} weights are in only one of the two); "
            "make the folder again with save_pretrained"
        )
    for group in sorted(described, key=sorted):
        if group not in held:
            return (
                f"{path}: its config.json says that {' and '.join(sorted(group))} are one tensor "
                "(tie_word_embeddings), but its weights hold different ones; set tie_word_embeddings to "
                "false there, or save the weights of only one of them"
                if len(group) > 1
                else f"{path}: its config.json says that {next(iter(group))} is a tensor of its own, but it "
                "shares one with others; save the model again"
            )
    return None


def _shared_names(parameters: Iterable[tuple[str, Tensor]]) -> set[frozenset[str]]:
    """Names of the parameters, grouped by the tensor that they share."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in parameters:
        names[id(parameter)].add(name)
    return {frozenset(group) for group in names.values()}


def _said(config: Any) -> dict[str, Any]:
    said = cast(dict[str, Any], json.loads(config.to_json_string(use_diff=False)))
    return {name: value for name, value in said.items() if name not in READING_ENTRIES}


def _not_finite(module: PolicyModule) -> SyncError:
    broken = [
        name
        for name, weight in module.policy.model.named_parameters()
        if not (weight.to_local() if isinstance(weight, DTensor) else weight).isfinite().all()
    ]
    start = f"version {module.policy_version}: the policy's log-probs are not finite"
    if not broken:
        return SyncError(
            f"{start}, although its weights are: the model overflows in this precision; "
            "try --trainer.precision 32-true",
            culprit="policy",
        )
    what = f"{len(broken)} of its weights hold values that are not finite ({', '.join(broken[:3])})"
    if module.policy_version == 0:
        return SyncError(
            f"{start}: {what}, as loaded from policy.path={module.policy.path}; make or download the model "
            "again",
            culprit="folder",
        )
    return SyncError(
        f"{start}: {what}; resume from an earlier checkpoint with a lower model.optimizer.lr",
        culprit="policy",
    )


def _diff(one: Tensor, other: Tensor) -> LogprobDiff:
    return LogprobDiff((one - other).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))


def _excess(diff: LogprobDiff, limits: LogprobLimits) -> float:
    """The mean as a multiple of its limit."""
    return diff.values.clamp(max=CAP * limits.mean).mean().item() / limits.mean
