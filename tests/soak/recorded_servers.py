"""The soak's two engines: one records the servers' completions, the other replays them.

They let us repeat the whole disturbed run without servers or faults. The repeated run must reach the same
weights, bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rpt_lightning.rollout.engines.base import EngineDtype, Sample
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.servers.server_engine import VLLMServerEngine
from rpt_lightning.rollout.weight_sync.transport import WeightTransport
from rpt_lightning.types import GenerationRequest

LIFE_VARIABLE = "RPT_SOAK_LIFE"  # number of the trainer's start


class RecordedServers(VLLMServerEngine):
    """The servers' engine, which also records every completion.

    It writes one file per life and rank, and one line per request. A line is written before its completions
    are trained on.
    """

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
    """An engine that replays the recorded completions.

    It holds the weights, so that versions and tensors are checked as usual. The policy's log-probs are
    checked against the recorded ones.
    """

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
    """Read the training requests of each step, as recorded by the last life that ran the step.

    A step that began before a fault and was never saved does not count as a step of the run.
    """
    last_life: dict[int, int] = {}
    rows = []
    for path in sorted(folder.glob("life-*.jsonl")):
        life = int(path.name.split("-")[1])
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the process was killed while writing, so nothing follows
            if row["temperature"] > 0:
                rows.append((life, row))
                last_life[row["version"]] = life
    return (row for life, row in rows if life == last_life[row["version"]])
