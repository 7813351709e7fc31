from __future__ import annotations

from dataclasses import replace

import pytest

from rpt_lightning.evaluation.compare_runs import comparison
from rpt_lightning.evaluation.cost import total
from rpt_lightning.evaluation.run import Run
from sample_results import FIRST, results


def logged(tokens: float, flops: float, seconds: float, **more: float) -> dict[str, float]:
    return {"cost/tokens": tokens, "cost/flops": flops, "cost/time_s": seconds} | more


def run(name: str, steps: dict[int, dict[str, float]], *, right: range, ntp: range, reasons: bool = True) -> Run:
    """100 positions of 50 documents, validated at step 2; ``right`` by reasoning, ``ntp`` without."""
    positions = [
        replace(
            FIRST, task_id=f"{i // 2}:{i}", doc_id=str(i // 2), position=i, reasoning_correct=i in right if reasons else None, ntp_correct=i in ntp,
            ntp_logprob=-0.5 if reasons else -0.75,
        )
        for i in range(100)
    ]  # fmt: skip
    return Run(name=name, steps=steps, validations={2: replace(results(*positions), step=2)}, rollouts={})


@pytest.fixture
def runs():
    rollout = {"rollout/prefill_tokens": 10.0, "rollout/tokens": 5.0, "cost/trained_tokens": 20.0, "cost/scored_tokens": 1.0, "time/sync_s": 0.25}
    rpt = run("rpt", {step: logged(36.0, 300.0, 2.0, **rollout) for step in (1, 2, 3)}, right=range(40), ntp=range(30))
    text = run("ntp", {step: logged(100.0, 600.0, 1.0) for step in (1, 2)}, right=range(0), ntp=range(50), reasons=False)
    return [rpt, text]


def cells(text: str, row: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_cost_is_that_of_the_steps_behind_the_validated_weights(runs):
    text = comparison(runs)
    assert cells(text, "tokens: prompts computed") == ["20", "not logged"]
    assert cells(text, "tokens: sampled") == ["10", "not logged"]
    assert cells(text, "tokens: trained") == ["40", "not logged"]
    assert cells(text, "tokens, all") == ["72", "200"]
    assert cells(text, "model FLOPs") == ["600", "1200"]
    assert cells(text, "model FLOPs / those of rpt") == ["1.00", "2.00"]
    assert cells(text, "seconds, all") == ["4", "2"]
    assert cells(text, "seconds / those of rpt") == ["1.00", "0.50"]


def test_every_mode_is_compared_in_pairs(runs):
    lines = [line for line in comparison(runs).splitlines() if line.startswith("- ")]
    shown = {line[2:].split(":")[0]: line for line in lines}
    assert set(shown) == {"NTP ntp - NTP rpt", "NTP ntp - reasoning rpt", "NTP loss ntp - rpt"}
    assert "+20.0 points" in shown["NTP ntp - NTP rpt"]
    assert "+10.0 points" in shown["NTP ntp - reasoning rpt"]
    assert "50 documents, 100 positions" in shown["NTP ntp - reasoning rpt"]
    assert "+0.2500 nats" in shown["NTP loss ntp - rpt"]
    other_order = comparison(runs[::-1])
    assert "- reasoning rpt - NTP ntp: -10.0 points" in other_order


def test_a_cost_with_gaps_and_a_run_without_validation_are_errors(runs):
    del runs[0].steps[1]["cost/flops"]
    with pytest.raises(ValueError, match="1 of 2 steps"):
        comparison(runs)
    assert total(runs[0], "no/such") is None
    with pytest.raises(ValueError, match="ntp: was never validated"):
        comparison([runs[0], replace(runs[1], validations={})])
