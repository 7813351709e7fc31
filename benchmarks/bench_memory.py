"""Compare peak memory of log-probs and entropy, forward and backward: ours, TRL's and plain full logits.

    python benchmarks/bench_memory.py

TRL's path is its chunked function. Each path runs in its own process on the same fp32 tensors (8,192 hidden
states of 896, Qwen2.5-0.5B's head of 151,936 tokens). The operating system measures it: the process's peak
resident memory minus what was resident before the call. Hidden states, weight and targets exist before the
call and do not count. The gradients that the call returns do count, and no path can use less than they need.
Full logits of 8,192 tokens do not fit on many machines, so that path runs at 1,024 tokens and is only
printed. The reference is the size of the fp32 logits, held once. TRL takes part if
`pip install trl==1.16.0` was run.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from result import store
from torch import Tensor

from rpt_lightning.policy.logprobs import chosen_logprobs

TEMPERATURE = 0.8
ENTROPY_COEFFICIENT = 0.01


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return chosen_logprobs(hidden, weight, targets, temperature=TEMPERATURE)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropy as `trl.trainer.utils.add_fused_lm_head` does."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    outputs = _ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, TEMPERATURE, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    return outputs[0], outputs[1]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ours": ours,
    "trl": trl,
    "plain": plain,
}


def loss_and_gradients(path: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    logprobs, entropy = PATHS[path](hidden, weight, targets)
    (-(logprobs.mean() + ENTROPY_COEFFICIENT * entropy.mean())).backward()


def make_inputs(tokens: int, vocabulary: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(tokens, width).normal_(generator=generator).requires_grad_()
    weight = torch.empty(vocabulary, width).normal_(std=0.05, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def memory(field: str) -> int:
    """Read ``VmRSS`` or ``VmHWM`` (its peak) of this process, in bytes."""
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def peak_bytes(path: str, tokens: int, vocabulary: int, width: int) -> int:
    loss_and_gradients(path, *make_inputs(16, 1000, width))  # loads libraries and their buffers
    inputs = make_inputs(tokens, vocabulary, width)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmRSS")
    loss_and_gradients(path, *inputs)
    return memory("VmHWM") - before


def measure(path: str, tokens: int, vocabulary: int, width: int) -> int:
    """Measure ``peak_bytes`` in a separate process."""
    command = [
        sys.executable,
        __file__,
        "--tokens",
        str(tokens),
        "--vocabulary",
        str(vocabulary),
        "--width",
        str(width),
        "--path",
        path,
    ]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    print(f"  {path}, {tokens:,} tokens: {peak / 1e6:,.0f} MB", flush=True)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"tokens": 8192, "vocabulary": 151936, "width": 896}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--short", action="store_true", help="Run tiny shapes and store nothing.")
    parser.add_argument("--path", choices=PATHS, help="Measure one path in this process.")
    args = parser.parse_args()
    if args.short:
        args.tokens, args.vocabulary, args.width = 1024, 10000, 64
    shape = (args.vocabulary, args.width)
    if args.path:
        print(peak_bytes(args.path, args.tokens, *shape))
        return
    logits = 4 * args.tokens * args.vocabulary
    gradients = 4 * args.width * (args.tokens + args.vocabulary)
    print(
        f"full fp32 logits of {args.tokens:,} tokens, once: {logits / 1e6:,.0f} MB; "
        f"the gradients that are returned: {gradients / 1e6:,.0f} MB"
    )
    measure("plain", args.tokens // 8, *shape)
    peak = measure("ours", args.tokens, *shape)
    name = f"n{args.tokens}-v{args.vocabulary}-d{args.width}"
    store(
        f"logprob-memory-vs-full-logits-{name}", peak / logits, limit=gradients / logits, target=1 / 8,
        unit="times the size of the full fp32 logits", keep=not args.short,
    )  # fmt: skip
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed, so it is not measured")
        return
    peak_trl = measure("trl", args.tokens, *shape)
    print(
        f"  without the gradients: ours {(peak - gradients) / 1e6:,.0f} MB, "
        f"TRL {(peak_trl - gradients) / 1e6:,.0f} MB"
    )
    store(
        f"logprob-memory-vs-trl-{name}", peak / peak_trl, limit=gradients / peak_trl, target=1.0,
        unit="times the peak of TRL 1.16's chunked function", keep=not args.short,
    )  # fmt: skip


if __name__ == "__main__":
    main()
