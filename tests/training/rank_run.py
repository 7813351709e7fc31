"""Run by the tests of several ranks in separate processes.

The only argument is a JSON object. See `Options`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from small_run import SCRIPT, quiet_trainer

from rpt_lightning.data.modules.tiers import Tiers
from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.data.modules.traces import TraceDataModule
from rpt_lightning.objectives.masked_span import MaskedSpanObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.proposed_span import ProposedSpanObjective
from rpt_lightning.objectives.rewards.next_token import Reward
from rpt_lightning.objectives.thought_budget import ThoughtBudget
from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout import position_kinds
from rpt_lightning.rollout.engines.hf_engine import HFEngine
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.rollout.settings import DynamicSampling, Sampling, Selection
from rpt_lightning.training.callbacks.logs import RolloutSamples, StepLog, ValidationResults
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.callback import RunCheckpoint, last_checkpoint
from rpt_lightning.training.distributed.strategy import ShardedStrategy
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.training.modules.rpt_module import RPTModule


@dataclass(kw_only=True)
class Options:
    folder: str
    model: str
    tasks: str
    kind: str = "rpt"  # or ntp
    ranks: int = 1
    strategy: str = "auto"  # or ddp, sharded
    strategy_options: dict[str, Any] = field(default_factory=dict)
    engine: str = "recorded"  # or hf, vllm
    steps: int = 10
    lr: float = 1e-3
    micro_batch_tokens: int = 16384
    wrong_normalizer: bool = False
    tasks_per_step: int = 8
    optimizer: str = "AdamW"  # of RPT; AdamW hides the gradient's scale, SGD does not
    optimizer_steps_per_batch: int = 1
    dynamic_sampling_from_step: int | None = None
    thought_budget: dict[str, Any] = field(default_factory=dict)
    tiers: dict[str, Any] = field(default_factory=dict)
    ntp_weight: float = 0.0
    selection: dict[str, Any] = field(default_factory=dict)
    proposals: list[str] = field(default_factory=list)  # lines of a script with spans that the policy names
    offload_moments: bool = False
    adapter: dict[str, Any] | None = None
    resume: bool = False
    validate: bool = False


class Recorded(ScriptedEngine):
    """Gives the same answers at the same step, whatever the last bits of the weights are.

    These are recorded rollouts with fresh log-probs.
    """

    def _update_weights(self, weights, version):
        super()._update_weights(weights, version)
        self._checksum = b""


class SomeAreRight(Reward):
    """A few arbitrary predictions are right.

    About 4 of 10 groups have differing rewards, unlike with a random model.
    """

    def group_rewards(self, answered):
        seeds = [
            None if prediction is None else f"{answered.task.task_id} {prediction!r}".encode()
            for prediction in answered.predictions
        ]
        return tuple(0.0 if seed is None else float(hashlib.sha256(seed).digest()[0] < 31) for seed in seeds)


class WrongNormalizer(RPTModule):
    """Each rank divides by its own tokens, which is the fault of averaging means.

    It is right only if all ranks have equally many tokens.
    """

    def _normalizer(self, samples, *, max_tokens):
        return (
            max(1.0, float(sum(len(sample.sequence.target_ids) for sample in samples))) * self.ranks.num_data
        )


def parts(options: Options, folder: Path):
    optimizer = torch.optim.SGD if options.kind == "ntp" else getattr(torch.optim, options.optimizer)
    policy, make_optimizer = (
        Policy(options.model, adapter=options.adapter and Adapter(**options.adapter)),
        lambda parameters: optimizer(parameters, lr=options.lr),
    )
    common = {
        "micro_batch_tokens": options.micro_batch_tokens,
        "offload_moments": options.offload_moments,
    }
    callbacks: list[Any] = [
        RunCheckpoint(every_n_steps=options.steps),
        StepLog(),
        ValidationResults(),
        RolloutSamples(every_n_steps=1),
    ]
    if options.kind == "ntp":
        module: Any = NTPModule(policy, make_optimizer, **common)
        # 13 held-out tasks in batches of 6: the second rank has nothing in the last batch.
        data: Any = TraceDataModule(
            options.tasks,
            ContinuationPrompt(),
            traces_per_step=8,
            positions_per_document=4,
            num_eval_tasks=13,
            eval_batch_size=6,
        )
    else:
        common |= {
            "optimizer_steps_per_batch": options.optimizer_steps_per_batch,
            "ntp_weight": options.ntp_weight,
        }
        module = (WrongNormalizer if options.wrong_normalizer else RPTModule)(
            policy, make_optimizer, correction="truncate", **common
        )
        data = TokenTaskDataModule(
            options.tasks,
            tasks_per_step=options.tasks_per_step,
            positions_per_document=2,
            tiers=Tiers(
                **{
                    name: tuple(value) if isinstance(value, list) else value
                    for name, value in options.tiers.items()
                }
            ),
        )
        engine = {
            "recorded": lambda: Recorded(
                options.proposals or [*SCRIPT, "so?</think>\\boxed{e}"]  # lengths of more kinds
            ),
            "hf": lambda: HFEngine(dtype="float32"),
            "vllm": lambda: VLLMEngine(dtype="float32", kv_cache_gib=0.1, max_num_seqs=16),
        }[options.engine]()
        rollout = RolloutCallback(
            engine,
            ProposedSpanObjective(MaskedSpanObjective(num_behind=24))
            if options.proposals
            else NextTokenObjective(ContinuationPrompt(), SomeAreRight()),
            group_size=4,
            max_prompt_tokens=320 if options.proposals else 128,
            sampling=Sampling(max_completion_tokens=24),
            dynamic_sampling=DynamicSampling(from_step=options.dynamic_sampling_from_step, max_factor=2.0),
            thought_budget=ThoughtBudget(**options.thought_budget),
            selection=Selection(**options.selection),
        )
        callbacks = [rollout, *callbacks]
    strategy: Any = {
        "auto": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120)),
        "sharded": lambda: ShardedStrategy(timeout_s=120, **options.strategy_options),
    }[options.strategy]()
    trainer = quiet_trainer(
        folder,
        options.steps,
        callbacks,
        devices=options.ranks,
        strategy=strategy,
        limit_val_batches=float(options.validate),
    )
    return trainer, module, data


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = Options(**json.loads(sys.argv[1]))
    # The tiny model's chances are near 1 / 512, so kinds are divided there.
    position_kinds.PROB_EDGES = (0.0005, 0.0015, 0.0018, 0.0019, 0.002, 0.0021, 0.003)
    folder = Path(options.folder)
    trainer, module, data = parts(options, folder)
    trainer.fit(
        module, data, ckpt_path=str(last_checkpoint(folder)) if options.resume else None, weights_only=True
    )
    if options.validate:
        trainer, module, data = parts(options, folder / "validate")
        trainer.validate(
            module, data, ckpt_path=str(last_checkpoint(folder)), weights_only=True, verbose=False
        )
