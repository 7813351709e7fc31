"""What else would fit on the same devices: the engine awake or asleep, and what is offloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rpt_lightning.planning.settings import RunSettings

# vLLM's shares of the device that are tried, in hundredths.
SHARES = range(95, 0, -5)
# What a plan may fill of a device. The rest is a margin for what the plan does not know.
USABLE = 0.9
# Whether the moments are offloaded, and whether everything is.
OFFLOADS = {
    "nothing offloaded": (False, False),
    "moments offloaded": (True, False),
    "CPU offload": (False, True),
}


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One way to arrange a run, with the largest share of the device that vLLM can take then."""

    offload: str
    sleeps: bool
    share: float
    total_bytes: float
    concurrent_sequences: float
    step_s: float


Outcome = tuple[float, float, float, float]


def alternatives(
    settings: RunSettings, outcome: Callable[[RunSettings], Outcome | None]
) -> list[Alternative]:
    """Return the arrangements that fit with a margin. None if there is nothing to arrange.

    Args:
        settings: Those of the run.
        outcome: Returns, for changed settings, the bytes on a device, the device's bytes, the completions
            decoded at a time and the seconds of a step. None: the engine does not start.
    """
    if not (settings.on_gpu and settings.engine == "vllm" and settings.strategy == "fsdp2"):
        return []
    found = []
    for sleeps in (False, True):
        for offload, (offload_moments, cpu_offload) in OFFLOADS.items():
            for hundredths in SHARES:
                changed = replace(
                    settings,
                    engine_sleeps=sleeps,
                    gpu_memory_utilization=hundredths / 100,
                    offload_moments=offload_moments,
                    cpu_offload=cpu_offload,
                )
                result = outcome(changed)
                if result is None or result[0] > USABLE * result[1]:
                    continue
                total, _, concurrent, step_s = result
                found.append(
                    Alternative(
                        offload=offload,
                        sleeps=sleeps,
                        share=hundredths / 100,
                        total_bytes=total,
                        concurrent_sequences=concurrent,
                        step_s=step_s,
                    )
                )
                break
    return found
