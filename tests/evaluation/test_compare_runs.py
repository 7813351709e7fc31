from __future__ import annotations

from dataclasses import replace

import pytest

from rpt_lightning.evaluation.compare_runs import comparison
from rpt_lightning.evaluation.run_cost import total
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.records.question_results import QuestionResult, QuestionResults
from sample_results import FIRST, results


def logged(tokens: float, flops: float, seconds: float, **more: float) -> dict[str, float]:
    return {"cost/tokens": tokens, "cost/flops": flops, "cost/time_s": seconds} | more


def run(
    name: str, steps: dict[int, dict[str, float]], *, right: range, ntp: range, reasons: bool = True
) -> Run:
    """Make 100 positions of 50 documents, validated at step 2: ``right`` by reasoning, ``ntp`` without."""
    positions = [
        replace(
            FIRST, task_id=f"{i // 2}:{i}", doc_id=str(i // 2), position=i,
            reasoning_correct=i in right if reasons else None, ntp_correct=i in ntp,
            ntp_logprob=-0.5 if reasons else -0.75,
        )
        for i in range(100)
    ]  # fmt: skip
    return Run(name=name, steps=steps, validations={2: replace(results(*positions), step=2)}, rollouts={})


@pytest.fixture
def runs():
    rollout = {
        "rollout/prefill_tokens": 10.0,
        "rollout/tokens": 5.0,
        "cost/trained_tokens": 20.0,
        "cost/scored_tokens": 1.0,
        "time/sync_s": 0.25,
    }
    rpt = run(
        "rpt",
        {step: logged(36.0, 300.0, 2.0, **rollout) for step in (1, 2, 3)},
        right=range(40),
        ntp=range(30),
    )
    text = run(
        "ntp",
        {step: logged(100.0, 600.0, 1.0) for step in (1, 2)},
        right=range(0),
        ntp=range(50),
        reasons=False,
    )
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
    with pytest.raises(ValueError, match="1 of 2 steps up to 2 logged cost/flops"):
        comparison(runs)
    assert total(runs[0], "no/such") is None
    with pytest.raises(ValueError, match="ntp: was never validated"):
        comparison([runs[0], replace(runs[1], validations={})])


def test_names_that_begin_alike_are_not_mixed_up():
    runs = [run("rpt", {}, right=range(40), ntp=range(30)), run("rpt-2", {}, right=range(50), ntp=range(35))]
    lines = [line for line in comparison(runs).splitlines() if line.startswith("- ")]
    assert [line[2:].split(":")[0] for line in lines] == [
        "reasoning rpt-2 - reasoning rpt",
        "NTP rpt-2 - NTP rpt",
        "reasoning rpt-2 - NTP rpt",
        "NTP rpt-2 - reasoning rpt",
        "NTP loss rpt-2 - rpt",
    ]
    assert "+10.0 points" in lines[0]


ANSWERS = QuestionResults(
    questions=(
        QuestionResult(
            question_id="q", answer="4", category=None, prompt_tokens=1, verdicts=("right",),
            predictions=("4",), lengths=(1,),
        ),
    ),
    benchmark="sums", policy_path="models/p", step=2, temperature=0.0, max_completion_tokens=8, seed=0,
)  # fmt: skip


def test_what_all_runs_were_asked_is_compared_and_the_rest_is_named(runs):
    rpt, ntp = runs
    asked_rpt, asked_ntp = (replace(one, answers={2: ANSWERS}) for one in runs)
    both = comparison([asked_rpt, asked_ntp])
    assert "| held-out positions | rpt | ntp |" in both
    assert "| sums | rpt | ntp |" in both
    assert "not compared" not in both
    positions = comparison([asked_rpt, ntp])
    assert "| held-out positions | rpt | ntp |" in positions
    assert "Answers to questions are not compared, because some runs were asked none: ntp." in positions
    answers = comparison([asked_rpt, replace(asked_ntp, validations={})])
    assert "| sums | rpt | ntp |" in answers
    assert "Held-out positions are not compared, because some runs were not validated at any: ntp." in answers
    with pytest.raises(
        ValueError, match="rpt: was never validated at held-out positions, and ntp was asked no questions"
    ):
        comparison([replace(asked_rpt, validations={}), ntp])
    with pytest.raises(ValueError, match="was never validated"):
        comparison([replace(rpt, validations={}), asked_ntp])
