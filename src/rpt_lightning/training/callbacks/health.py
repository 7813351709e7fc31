"""Warns when the policy seems to collapse, and ends the run on request.

A warning needs a signal that holds over a window of steps. The signals are an entropy near 0 (always the same
answer), groups whose rewards are all equal (nothing to learn), completions that shrink to a fraction of their
initial length, and completions that run into the token limit.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from rpt_lightning.flag_bounds import check_number
from rpt_lightning.training.callbacks.stop import STATUS_UNHEALTHY, StopRun
from rpt_lightning.training.modules.policy_module import PolicyModule

METRICS = ("policy/entropy", "rollout/live_groups_frac", "rollout/length_mean", "rollout/truncated_frac")


class Health(Callback):
    """Warns once when a mean over the last ``window`` steps passes its threshold.

    It warns again only after the mean has returned to the allowed range. A threshold of None turns off its
    warning.

    Args:
        window: Number of optimizer steps to average over.
        min_entropy: Warn if the policy's entropy is below this, in nats per token.
        max_equal_groups: Warn if the fraction of groups whose rewards are all equal is above this.
        min_length: Warn if the mean length of completions is below this fraction of the mean over the run's
            first window.
        max_truncated: Warn if the fraction of completions that reached the token limit is above this.
        stop: End the run at the first warning, with a checkpoint and exit status 3. If a launcher resumes the
            run from that checkpoint, the run ends again for the same reason.
    """

    def __init__(
        self,
        window: int = 20,
        min_entropy: float | None = 0.02,
        max_equal_groups: float | None = 0.95,
        min_length: float | None = 0.25,
        max_truncated: float | None = 0.75,
        stop: bool = False,
    ) -> None:
        if window < 1:
            raise ValueError(f"health.window={window}: give 1 step or more")
        for name, share in (
            ("max_equal_groups", max_equal_groups),
            ("min_length", min_length),
            ("max_truncated", max_truncated),
        ):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"health.{name}={share}: give a share from 0 to 1, or null for no warning")
        check_number("health.min_entropy", min_entropy, least=0, hint=" (nats), or null for no warning")
        self.window = window
        self.min_entropy = min_entropy
        self.max_equal_groups = max_equal_groups
        self.min_length = min_length
        self.max_truncated = max_truncated
        self.stop = stop
        self._recent: deque[list[float]] = deque(maxlen=window)  # METRICS of each step
        self._first_length: float | None = None  # mean over the first window, tokens
        self._warned: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stop and (found := self._found()):
            self._ask_to_stop(trainer, next(iter(found.values())))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        logged = pl_module.step_metrics
        if not all(name in logged for name in METRICS):
            return  # this run does not learn from rollouts
        warnings = self.check(*(logged[name] for name in METRICS))
        for text in warnings:
            rank_zero_warn(f"health at step {trainer.global_step}: {text}")
        if warnings and self.stop:
            self._ask_to_stop(trainer, warnings[0])

    @staticmethod
    def _ask_to_stop(trainer: Trainer, text: str) -> None:
        way_on = (
            "look at the last samples; then continue with --ckpt_path last and another setting, "
            "or --health.stop false"
        )
        StopRun.request(trainer, f"health.stop, {text}", status=STATUS_UNHEALTHY, way_on=way_on)

    def check(self, entropy: float, live_groups: float, length: float, truncated: float) -> list[str]:
        """Record one step's metrics and return the new warnings."""
        self._recent.append([entropy, live_groups, length, truncated])
        found = self._found()
        new = [text for name, text in found.items() if name not in self._warned]
        self._warned = set(found)
        return new

    def _found(self) -> dict[str, str]:
        """The current warnings, by name."""
        if len(self._recent) < self.window:
            return {}
        _, live_groups, length, truncated = (
            sum(values) / len(self._recent) for values in zip(*self._recent, strict=True)
        )
        # A step without any group whose rewards differ trains no token, so its entropy says nothing.
        entropies = [row[0] for row in self._recent if row[1] != 0]
        entropy = sum(entropies) / len(entropies) if entropies else None
        if self._first_length is None:
            self._first_length = length
        found: dict[str, str] = {}
        over = f"mean of {self.window} steps"
        if self.min_entropy is not None and entropy is not None and entropy < self.min_entropy:
            found["entropy"] = (
                f"the policy's entropy is {entropy:.4f} nats ({over}; "
                f"health.min_entropy={self.min_entropy}): it always gives the same answer"
            )
        if self.max_equal_groups is not None and 1 - live_groups > self.max_equal_groups:
            found["equal"] = (
                f"{1 - live_groups:.0%} of the groups have equal rewards ({over}; "
                f"health.max_equal_groups={self.max_equal_groups}): hardly anything is learned"
            )
        if self.min_length is not None and length < self.min_length * self._first_length:
            found["length"] = (
                f"completions have {length:.1f} tokens, {self._first_length:.1f} at the start of the run "
                f"({over}; health.min_length={self.min_length})"
            )
        if self.max_truncated is not None and truncated > self.max_truncated:
            found["truncated"] = (
                f"{truncated:.0%} of the completions run into rollout.sampling.max_completion_tokens "
                f"({over}; health.max_truncated={self.max_truncated})"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": list(self._recent),
            "first_length": self._first_length,
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent.extend(state_dict["recent"])
        self._first_length = state_dict["first_length"]
        self._warned = set(state_dict["warned"])
