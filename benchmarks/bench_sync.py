"""Compare weight sync to a vLLM engine in this process with a plain copy of the same tensors to new memory.

    python benchmarks/bench_sync.py
    python benchmarks/bench_sync.py --profile         # also shows where a sync spends its time

The policy is a random model of SmolLM2-135M's size in fp32. The engine's dtype is fp32, and also bf16 if the
CPU has instructions for it. The copy converts the same stream of tensors, with the tied head under both its
names, to the engine's dtype. Verification (`check_weights`) is timed separately. The peak of resident memory
during a sync, divided by the size of the engine's weights, shows whether there is a second full copy of them.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import itertools
import pstats
import re
import tempfile
from pathlib import Path

import torch
from model_folder import make_model_folder
from result import alternate, store

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.training.cpu_precision import bf16_is_slow
from rpt_lightning.training.engine_check.sync_check import check_weights


def memory(field: str) -> int:
    """Read ``VmRSS`` or ``VmHWM`` (its peak) of this process, in bytes."""
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


class Paths:
    """Weight sync, its verification and the plain copy, for one policy and one engine."""

    def __init__(self, policy: Policy, engine: VLLMEngine) -> None:
        self.policy, self.engine = policy, engine
        self.versions = itertools.count()
        self.turns = itertools.count()

    def sync(self) -> None:
        self.engine.update_weights(named_weights(self.policy), version=next(self.versions))

    def check(self) -> None:
        assert self.engine.version is not None
        check_weights(
            self.engine, named_weights(self.policy), version=self.engine.version, turn=next(self.turns)
        )

    def copy(self) -> None:
        copies = [
            torch.empty_like(tensor, dtype=self.engine.dtype).copy_(tensor)
            for _, tensor in named_weights(self.policy)
        ]
        del copies

    def check_all(self) -> None:
        """Check that every weight arrived."""
        weights = dict(named_weights(self.policy))
        held = self.engine.read_weights(tuple(weights))
        wrong = [
            name
            for name, tensor in weights.items()
            if not torch.equal(held[name], tensor.to(self.engine.dtype))
        ]
        if wrong:
            raise SystemExit(f"the engine does not hold the policy's {', '.join(wrong)}")

    def growth(self) -> int:
        """Return the bytes by which resident memory grows during a weight sync, at its peak."""
        ctypes.CDLL(None).malloc_trim(0)  # free memory that the allocator keeps would hide a copy
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = memory("VmRSS")
        self.sync()
        return memory("VmHWM") - before


def measure(policy: Policy, dtype: str, args: argparse.Namespace) -> None:
    """Measure all figures of one dtype."""
    with VLLMEngine(dtype=dtype, kv_cache_gib=0.25, max_num_seqs=8) as engine:
        engine.start(policy.path, seed=0, max_model_len=256)
        paths = Paths(policy, engine)
        print(f"--- {engine.description}", flush=True)
        seconds = alternate(
            {"weight sync": paths.sync, "check": paths.check, "copy": paths.copy}, args.repeats
        )
        paths.check_all()
        growth = paths.growth()
        if args.profile:
            with cProfile.Profile() as profile:
                paths.sync()
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)
        num_bytes = sum(parameter.numel() for parameter in policy.model.parameters()) * engine.dtype.itemsize
    keep = not args.short
    print(
        f"  weights {num_bytes / 1e6:,.0f} MB, grew by {growth / 1e6:,.0f} MB; "
        f"verification {seconds['check']:.2f} s"
    )
    store(
        f"sync-vs-copy-{dtype}", seconds["copy"] / seconds["weight sync"], limit=1.0, target=None,
        unit="times the speed of a plain copy of the weights", keep=keep, weight_bytes=num_bytes,
    )  # fmt: skip
    store(
        f"sync-memory-{dtype}", growth / num_bytes, limit=0.0, target=0.5,
        unit="times the weights' size in extra memory during a weight sync", keep=keep,
        growth_bytes=growth, weight_bytes=num_bytes,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where a weight sync spends its time")
    parser.add_argument(
        "--short", action="store_true", help="run a tiny model for a few seconds, store nothing"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32"] if bf16_is_slow() else ["float32", "bfloat16"],
    )
    args = parser.parse_args()
    if args.short:
        args.repeats, args.dtypes = 1, ["float32"]
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as temporary:
        policy = Policy(str(make_model_folder(Path(temporary) / "model", short=args.short)))
        policy.materialize()
        for dtype in args.dtypes:
            measure(policy, dtype, args)


if __name__ == "__main__":
    main()
