"""Every benchmark still runs and both of its sides compute the same.

Stored results are judged correctly and appear in the documents.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# Whole runs and engines take longer than the default suite allows; `make bench-short` runs them too.
MARKS = {
    "bench_rollout": [pytest.mark.long, pytest.mark.vllm],
    "bench_sync": [pytest.mark.long, pytest.mark.vllm],
    "bench_threads": [pytest.mark.long],
    "bench_overhead": [pytest.mark.long],
    "bench_whole_step": [pytest.mark.long],
    "bench_prepare": [pytest.mark.long],
    "bench_memory": [pytest.mark.long],
}
NAMES = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in NAMES])
def test_benchmark_in_its_short_form(name: str):
    before = {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")}
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--short"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(limit " in done.stdout
    assert {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")} == before


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("result", "machine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import result

    return result


@pytest.mark.parametrize(
    ("value", "limit", "target", "is_met"),
    [
        (5.0, 7.0, 6.0, False),
        (6.0, 7.0, 6.0, True),
        (0.04, 0.0, 0.05, True),
        (0.06, 0.0, 0.05, False),
        (1.0, 1.0, 1.0, True),
        (3.0, 4.0, None, None),
    ],
)
def test_a_figure_is_good_on_its_limits_side_of_the_target(
    result, monkeypatch, tmp_path, value, limit, target, is_met
):
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    result.store("figure", value, limit=limit, target=target, unit="times", rows=3)
    (stored,) = result.read_results(tmp_path)
    assert stored.is_met is is_met
    assert stored.value == value
    assert stored.details == {"rows": 3}
    assert 0 <= stored.other_load <= 1
    assert stored.commit != "unknown"


def test_alternation_is_a_median_without_the_warm_up(result, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(result.time, "perf_counter", lambda: clock[0])
    costs = {"a": iter([100.0, 1.0, 5.0, 2.0]), "b": iter([50.0, 4.0, 4.0, 9.0])}
    order = []

    def run(name):
        order.append(name)
        clock[0] += next(costs[name])

    assert result.alternate({name: lambda name=name: run(name) for name in costs}, 3) == {"a": 2.0, "b": 4.0}
    assert order == ["a", "b"] * 4


def test_other_processes_are_seen_and_own_children_are_not_taken_for_them(result):
    burn = [
        sys.executable,
        "-c",
        "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass",
    ]
    machine = sys.modules["machine"]
    before = machine._own_seconds()
    subprocess.run(burn, check=True)
    assert machine._own_seconds() - before >= 0.5  # one that was waited for
    before = machine._own_seconds()
    child = subprocess.Popen(
        [*burn[:2], burn[2] + "\nprint(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        child.stdout.read(1)
        assert machine._own_seconds() - before >= 0.5  # one that still runs
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def table(result, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "table", raising=False)
    import table

    return table


def test_documents_show_the_stored_results(table, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    table.main()
    stale = tmp_path / "stale.md"
    stale.write_text(f"text\n{table.BEGIN}\nan older table\n{table.END}\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "DOCUMENT", stale)
    with pytest.raises(SystemExit, match=r"stale.md: the table does not match"):
        table.main()
    monkeypatch.setattr(sys, "argv", ["table.py"])
    table.main()
    assert stale.read_text() == f"text\n{table.BEGIN}\n{table.render(table.read_results())}\n{table.END}\n"


def test_the_table_says_what_is_not_met_and_what_was_disturbed(result, table, monkeypatch, tmp_path):
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    result.store("speed", 3.0, limit=4.0, target=3.4, unit="times as fast", target_share_of_limit=0.85)
    monkeypatch.setattr(result._run, "other_load", 0.4)
    result.store("share", 0.01, limit=0.0, target=0.02, unit="of a step")
    share, speed = (
        line for line in table.render(result.read_results(tmp_path)).splitlines() if line.startswith("| `")
    )
    assert speed.startswith("| `speed` | 3.00 times as fast")
    assert speed.endswith("| 4.00 | at least 3.40 (85% of the limit; reached: 75%) | **no** |")
    assert (
        share
        == "| `share` | 0.01 of a step (other processes took 40% of the CPU time) | 0 | at most 0.02 | yes |"
    )
