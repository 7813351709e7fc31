"""Two ranks with sharded weights are one: the same weights, checkpoint and validation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.export import export
from rpt_lightning.metrics.results import read_results
from rpt_lightning.training.checkpoint import last_checkpoint


@pytest.mark.long
def test_two_ranks_validate_what_one_does(tiny_model_dir, tiny_task_dir, tmp_path):
    results = []
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        script = Path(__file__).with_name("two_rank_run.py")
        run = subprocess.run(
            [sys.executable, script, folder, tiny_model_dir, tiny_task_dir, str(num_ranks)], capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.count("held-out accuracy of") == 1  # by the first rank alone
        assert "sync_dist" not in run.stderr
        assert [path.name for path in (folder / "validate" / "validation").glob("*.jsonl")] == ["step-000002.jsonl"]
        results.append(read_results(folder / "validate" / "validation" / "step-000002.jsonl"))
        export(str(last_checkpoint(folder)), str(folder / "hf"))
    one, two = ({row.task_id: row for row in result.positions} for result in results)
    assert len(one) == len(results[0].positions) == len(results[1].positions) == 13
    assert one.keys() == two.keys()
    for task_id, row in one.items():
        assert row.ntp_logprob == pytest.approx(two[task_id].ntp_logprob, abs=1e-3)
    start, *exported = (
        torch.cat([weight.flatten() for weight in AutoModelForCausalLM.from_pretrained(path).state_dict().values()])
        for path in (tiny_model_dir, tmp_path / "1" / "hf", tmp_path / "2" / "hf")
    )
    assert (exported[0] - exported[1]).norm() < 0.01 * (exported[0] - start).norm()  # of the update; a wrong normaliser is off by a factor of 2
