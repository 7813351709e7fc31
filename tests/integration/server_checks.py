"""Requests for servers in tests, and checks that the answers are the policy's."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace

import torch
from server_processes_for_tests import KEY, ServerUnderTest
from stand_in_server import say

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import pack
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.weight_sync.checksum import checksum
from rpt_lightning.types import Completion, GenerationRequest, SamplingSettings, TrainSequence

TEMPERATURE = 0.8
SAMPLING = SamplingSettings(temperature=TEMPERATURE, max_tokens=24, stop_token_ids=(1,))
REQUESTS = [
    GenerationRequest(
        task_id=f"doc-{i // 2}:{i}",
        prompt_ids=tuple(range(40 + i, 60 + 3 * i)),
        n=4,
        seed=100 * i,
        sampling=SAMPLING,
    )
    for i in range(6)
]
# Long enough for a fault to come in the middle.
LONG_REQUESTS = [
    replace(request, sampling=replace(SAMPLING, max_tokens=160, stop_token_ids=())) for request in REQUESTS
]


def call(server: ServerUnderTest, path: str, body: object) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    urllib.request.urlopen(
        urllib.request.Request(server.url + path, data=json.dumps(body).encode(), headers=headers), timeout=30
    ).close()


def check_completions(
    servers: list[ServerUnderTest],
    policy: Policy,
    requests: list[GenerationRequest],
    rows: list[list[Completion]],
    *,
    version: int = 3,
) -> None:
    """Check that every completion comes from this policy's weights: none is lost, doubled or stale."""
    checksums = {name: checksum(weight) for name, weight in named_weights(policy)}
    for request, row in zip(requests, rows, strict=True):
        assert [completion.policy_version for completion in row] == [version] * request.n
        for index, completion in enumerate(row):
            if servers[0].kind == "stand-in":
                expected = say(
                    checksums, request.prompt_ids, request.seed + index, request.sampling.max_tokens
                )
                assert list(completion.token_ids) == expected
                continue
            (tree,) = pack(
                [TrainSequence(prompt_ids=request.prompt_ids, target_ids=completion.token_ids)],
                max_tokens=4096,
            )
            with torch.no_grad():
                logprobs, _ = policy(tree, temperature=TEMPERATURE)
            torch.testing.assert_close(
                tree.unpack(logprobs)[0], torch.tensor(completion.rollout_logprobs), atol=1e-3, rtol=0
            )


def many(requests: list[GenerationRequest], times: int) -> list[GenerationRequest]:
    return [
        replace(request, task_id=f"{turn}-{request.task_id}", seed=request.seed + 10_000 * turn)
        for turn in range(times)
        for request in requests
    ]
