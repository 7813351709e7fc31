from __future__ import annotations

import itertools
import json

import pytest

from rpt_lightning.training.callbacks.budget import Budget
from rpt_lightning.training.callbacks.logs import StepLog
from rpt_lightning.training.callbacks.machine_stats import MachineStats, speed_metrics

LOGGED = {
    "cost/tokens": 6000.0,
    "cost/time_s": 10.0,
    "cost/train_flops": 8e15,
    "time/forward_backward_s": 3.0,
    "time/optimizer_s": 1.0,
}


def test_speeds_of_a_device_by_hand():
    """8e15 operations in 4 seconds on 4 devices: 0.5e15 a second and device, half of a peak of 1e15."""
    assert speed_metrics(LOGGED, 1e15, 4) == {"perf/device_tokens_per_s": 150.0, "perf/mfu": 0.5}
    assert speed_metrics(LOGGED, None, 4) == {"perf/device_tokens_per_s": 150.0}


@pytest.mark.parametrize("peak", [None, 1e12])
def test_a_run_logs_its_share_of_a_peak_that_is_known(make_run, tmp_path, caplog, peak):
    trainer, module, data = make_run(2, callbacks=[MachineStats(peak), StepLog()])
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(module, data)
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["perf/device_tokens_per_s"] == pytest.approx(
            line["cost/tokens"] / line["cost/time_s"], rel=1e-6
        )
        assert 0 < line["perf/host_memory_gib"] < 100
        assert line["run/restarts"] == 0
        seconds = line["time/forward_backward_s"] + line["time/optimizer_s"]
        assert line.get("perf/mfu") == (
            None if peak is None else pytest.approx(line["cost/train_flops"] / seconds / peak, rel=1e-5)
        )
    assert [text for text in caplog.messages if "perf/mfu" in text] == (
        [
            "perf/mfu is left out: the peak of a CPU in 32-true is not known here; "
            "set it with --machine.peak_flops_per_device (operations per second)"
        ]
        if peak is None
        else []
    )


def test_the_order_of_callbacks_changes_nothing(make_run, tmp_path):
    """Whoever reads a step at its end finds all of its metrics, also those of callbacks behind him."""
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "steps.jsonl").write_text('{"step": 1, "cost/flops": 1.0}\n')
    logged = []
    for order in itertools.permutations((MachineStats, StepLog, Budget)):
        made = {MachineStats: MachineStats(1e12), Budget: Budget(str(tmp_path / "like"))}
        folder = tmp_path / str(len(logged))
        callbacks = [made.get(kind) or kind() for kind in order]
        trainer, module, data = make_run(3, run_dir=folder, callbacks=callbacks)
        trainer.callbacks.reverse()  # the rollout callback, which stands first, last
        trainer.fit(module, data)
        (line,) = (folder / "steps.jsonl").read_text().splitlines()  # the budget is spent after one step
        logged.append(json.loads(line))
    assert {"perf/mfu", "perf/live_groups_per_s", "time/step_s", "cost/flops"} <= logged[0].keys()
    assert all(line.keys() == logged[0].keys() for line in logged)
    assert all(line["cost/flops"] == logged[0]["cost/flops"] for line in logged)


def test_a_peak_is_above_0():
    with pytest.raises(ValueError, match=r"machine.peak_flops_per_device=0"):
        MachineStats(0.0)
