"""One of two ranks that share servers. Usage: python two_rank_servers.py MODEL FOLDER MAX_TOKENS URL..."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.servers.server_engine import VLLMServerEngine
from rpt_lightning.rollout.weight_sync.transport import SharedFolderTransport
from rpt_lightning.training.engine_check.sync_check import check_weights
from rpt_lightning.types import GenerationRequest, SamplingSettings


def gathered(weights):
    """Yield weights like sharded ones, each through a collective."""
    for name, tensor in weights:
        dist.broadcast(tensor.clone(), src=0)
        yield name, tensor


def change(policy: Policy) -> None:
    """Make a step that changes a few weights."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.view(-1)[::97] += 0.5


def main(model: str, folder: str, max_tokens: int, urls: list[str]) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    policy = Policy(model)
    policy.materialize()
    sampling = SamplingSettings(temperature=1.0, max_tokens=max_tokens, stop_token_ids=())
    requests = [
        GenerationRequest(
            task_id=f"r{rank}:{i}", prompt_ids=(rank, i), n=2, seed=100 * rank + i, sampling=sampling
        )
        for i in range(4)
    ]
    engine = VLLMServerEngine(urls, SharedFolderTransport(folder, shard_gib=0.0001), dtype="float32")
    engine.start(model, seed=0, max_model_len=256)
    for version in (1, 2):
        change(policy)
        engine.update_weights(gathered(named_weights(policy)), version=version)
        check_weights(engine, named_weights(policy), version=version, num_tensors=1000)
        print(f"generating version {version}", flush=True)
        rows = engine.generate(requests)
    found = {
        "completions": [[completion.token_ids for completion in row] for row in rows],
        "version": engine.version,
        "label": engine._weights.label,
        "sent": asdict(engine.sent_weights),
    }
    # A failure on the first rank while weights are gathered is an error on both, and neither waits for the
    # other.
    if rank == 0:
        shutil.rmtree(folder)
    try:
        engine.update_weights(gathered(named_weights(policy)), version=3)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["version after the error"] = engine.version
    dist.barrier()
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
