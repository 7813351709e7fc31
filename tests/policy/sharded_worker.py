"""Three optimizer steps of a sharded policy. test_sharding.py runs this in separate processes.

The worker records what the policy held before and after the steps.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.parallel.sharding import materialize_sharded
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.types import TrainSequence

SEQUENCES = [
    TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 5)),
    TrainSequence(prompt_ids=(9, 8), target_ids=(7, 3, 2)),
]


def three_steps(policy: Policy, *, bf16: bool = False) -> dict[str, Any]:
    """Run three steps. Every rank scores the same sequences, so all ranks together compute what one would."""
    (tree,) = policy.pack(SEQUENCES, max_tokens=100)
    start = {name: weight.clone() for name, weight in named_weights(policy)}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    logprobs, norms = [], []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            scores = policy(tree)[0]
        scores.sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        logprobs.append(scores.detach())
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
    dtypes = {parameter.dtype for parameter in policy.parameters()} | {
        state["exp_avg"].dtype for state in optimizer.state.values()
    }
    return {
        "start": start,
        "end": dict(named_weights(policy)),
        "logprobs": torch.stack(logprobs),
        "norms": norms,
        "dtypes": dtypes,
        "base_hash": policy.base_hash,
    }


def work(
    rank: int, shape: tuple[int, int], path: str, output: Path, options: dict[str, Any], bf16: bool
) -> None:
    dist.init_process_group(
        "gloo",
        f"file://{output}.rendezvous",
        rank=rank,
        world_size=shape[0] * shape[1],
        timeout=timedelta(seconds=60),
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # the first rank's seed counts
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
    adapter = options.pop("adapter", None)
    policy = Policy(
        path,
        activation_checkpointing=options.pop("activation_checkpointing", False),
        adapter=adapter and Adapter(**adapter),
    )
    materialize_sharded(policy, mesh, device=torch.device("cpu"), **options)
    result = three_steps(policy, bf16=bf16)
    result["is_tied"] = policy.is_tied
    result["num_held"] = sum(parameter.to_local().numel() for parameter in policy.parameters())
    if rank == 0:
        torch.save(result, output)
    dist.barrier()
    dist.destroy_process_group()
