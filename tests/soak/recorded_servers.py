"""Two engines of the soak: one that writes down what the servers said, and one that says it again.

With them the whole disturbed run is done once more without servers and without faults: it must come to the same weights, bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rpt_lightning.rollout.engine import EngineDtype, Sample
from rpt_lightning.rollout.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.vllm_server_engine import VLLMServerEngine
from rpt_lightning.rollout.weight_transport import WeightTransport
from rpt_lightning.types import GenerationRequest

LIFE_VARIABLE = "RPT_SOAK_LIFE"  # number of the trainer's start


class RecordedServers(VLLMServerEngine):
    """A file for each life and rank, a line for each request, on the disk before anything is trained with it."""

    def __init__(
        self,
        recordings: str,
        urls: list[str],
        transport: WeightTransport,
        dtype: EngineDtype = "float32",
        max_num_seqs: int = 128,
        timeout_s: float = 60.0,
        max_wait_s: float = 300.0,
    ) -> None:
        super().__init__(
            urls, transport, dtype, max_num_seqs=max_num_seqs, timeout_s=timeout_s, max_wait_s=max_wait_s
        )
        self.recordings = recordings

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        rows = super()._generate(requests)
        path = (
            Path(self.recordings)
            / f"life-{int(os.environ[LIFE_VARIABLE]):04d}-rank-{os.environ.get('LOCAL_RANK', '0')}.jsonl"
        )
        with path.open("a") as file:
            for request, row in zip(requests, rows, strict=True):
                key = {
                    "version": self.version,
                    "task": request.task_id,
                    "seed": request.seed,
                    "temperature": request.sampling.temperature,
                }
                file.write(json.dumps(key | {"samples": row}) + "\n")
        return rows


class Replay(ScriptedEngine):
    """Says what was recorded. It holds the weights, so that versions and tensors are checked as ever, and the policy's log-probs against the recorded."""

    def __init__(self, recordings: str, dtype: EngineDtype = "float32") -> None:
        super().__init__(["nothing of its own"], dtype)
        self._recorded = {
            (row["version"], row["task"], row["seed"]): row["samples"]
            for row in read_recordings(Path(recordings))
        }

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        return [
            [
                Sample(tuple(token_ids), tuple(logprobs))
                for token_ids, logprobs in self._recorded[self.version, request.task_id, request.seed]
            ]
            for request in requests
        ]


def read_recordings(folder: Path) -> Iterator[dict]:
    """Of training, each step as its last life did it: a step that was begun before a fault and not saved is no step of the run."""
    last_life: dict[int, int] = {}
    rows = []
    for path in sorted(folder.glob("life-*.jsonl")):
        life = int(path.name.split("-")[1])
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the process was killed while it wrote, so nothing comes behind it
            if row["temperature"] > 0:
                rows.append((life, row))
                last_life[row["version"]] = life
    return (row for life, row in rows if life == last_life[row["version"]])
