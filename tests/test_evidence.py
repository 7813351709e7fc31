"""`make evidence`: what is kept of an arm, and what the page makes of it."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rpt_lightning.records.results import Results, write_results
from sample_results import FIRST

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
arms, records, page, evidence, scaling, cases, answers = (
    importlib.import_module(f"evidence{part}")
    for part in ("_arms", "_records", "_page", "", "_scaling", "_cases", "_answers")
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def leave_run(folder: Path, reasoning: str, ntp: str) -> Path:
    """A run of two steps whose last validation has a position for each character, at depth 2, 3, 4, ..."""
    positions = tuple(
        replace(
            FIRST, task_id=f"g{number}:9", doc_id=f"g{number}", fields={"depth": 2 + number},
            reasoning_correct=one == "1", ntp_correct=two == "1",
                length=10 + number)
        for number, (one, two) in enumerate(zip(reasoning, ntp, strict=True))
    )  # fmt: skip
    write_results(
        Results(positions=positions, policy_path="p", step=2), folder / "validation" / "step-000002.jsonl"
    )
    steps = [
        {
            "step": step,
            "reward/mean": step / 4,
            "rollout/length_mean": 10.0 * step,
            "rollout/live_groups_frac": 0.5,
            "rollout/tokens": 100.0,
            "cost/flops": 1e9,
        }
        for step in (1, 2)
    ]
    (folder / "steps.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return folder


def record(reasoning: str, ntp: str) -> object:
    return records.measure(
        leave_run(Path("run"), reasoning, ntp), about={"commands": ["rpt fit"], "commit": "abc", "seconds": 3}
    )


def test_an_arm_is_kept_as_it_was() -> None:
    kept = record("1101", "0100")
    assert kept.right == {"reasoning": "1101", "ntp": "0100"}  # the controls were not asked
    assert kept.depths == (2, 3, 4, 5)
    assert kept.curves == {"reward": (0.25, 0.5), "length": (10.0, 20.0), "live": (0.5, 0.5)}
    assert (kept.flops, kept.sampled_tokens, kept.mean_length) == (2e9, 200, 11.5)
    assert str(kept.rate("reasoning")).endswith("3/4")
    assert str(kept.rate("reasoning", range(4, 6))).endswith("1/2")
    file = Path("seed-0.json")
    records.write_record(file, "base", kept)
    records.write_record(file, "ntp", replace(kept, flops=1.0))
    again = records.read_records(file)
    assert again["base"] == kept
    assert again["ntp"].flops == 1.0


def test_the_page_shows_every_arm_beside_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("docs/evidence")
    for seed, right in ((0, "1111"), (1, "1110")):
        records.write_record(folder / f"seed-{seed}.json", "base", record(right, "0001"))
        records.write_record(folder / f"seed-{seed}.json", "p_cot-0", record("1000", "1000"))
        records.write_record(folder / f"seed-{seed}.json", "ntp", record("0000", "0100"))
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    Path("docs/evidence.md").write_text(text, encoding="utf-8")
    page.write_page()
    made = Path("docs/evidence.md").read_text(encoding="utf-8")
    lines = made.splitlines()
    (base,) = [line for line in lines if line.startswith("| **base**")]
    assert "100.0 %, 75.0 %" in base
    assert "7/8" in base
    assert "2/8" in base  # the next token at once
    (found,) = [line for line in lines if line.startswith("| **p_cot-0**")]
    assert "not found: below 40 %, as before" in found
    assert "-62.5 [" in found  # 2 of 8 against 7 of 8
    (rival,) = [line for line in lines if line.startswith("| **ntp**")]
    assert "the same" in rival
    assert "25.0 %, 25.0 %" in rival
    assert all((folder / name).stat().st_size > 5000 for name in ("rewards.png", "depths.png"))
    page.write_page()
    assert Path("docs/evidence.md").read_text(encoding="utf-8") == made


def test_arms_have_names_of_their_own_and_say_what_is_expected() -> None:
    names = [arm.name for arm in arms.ARMS]
    assert len(set(names)) == len(names)
    assert names[0] == "base"  # whose cost is its rivals' budget
    assert all(len(arm.expected) > 5 and arm.group in page.GROUPS for arm in arms.ARMS)
    assert {arm.start for arm in arms.ARMS} == {start.name for start in arms.STARTS}
    assert {arm.tasks for arm in arms.ARMS} == {"base", *evidence.TASKS}


def test_the_arms_phases_are_those_of_the_start_models_configuration() -> None:
    """Start models that branch off continue after the second phase of the base's."""
    import yaml

    config = yaml.safe_load((ROOT / "configs" / "demo" / "start.yaml").read_text())
    phases = config["data"]["init_args"]["phases"]
    assert [yaml.safe_load(phase) for phase in arms.BASE_START.phases] == phases
    assert phases[0]["steps"] + phases[1]["steps"] == arms.BRANCH_STEP
    assert config["trainer"]["max_steps"] == arms.LAST_STEP == sum(phase["steps"] for phase in phases)
    assert arms.BRANCH_STEP % config["checkpoint"]["keep_every_n_steps"] == 0


def test_commands_of_an_arm_are_those_of_its_seed() -> None:
    seed = evidence.Seed(1)
    for arm in arms.ARMS:
        make = {"rpt": seed._rpt, "ntp": seed._ntp, "sft": seed._sft}[arm.kind]
        commands = [" ".join(command) for command in make(arm, seed.folder / arm.name)]
        assert all("--seed_everything 1" in command for command in commands)
        assert "tasks/demo-seed-1" in commands[-1]  # all are measured at the base's positions
        assert all(str(seed.folder / arm.name) in command for command in commands)


def test_only_what_has_no_record_is_run_and_a_rival_has_its_budget() -> None:
    seed = evidence.Seed(4)
    assert seed.arms_to_run([]) == list(arms.ARMS)
    kept = record("1101", "0100")
    for arm in arms.ARMS:
        if arm.name not in ("sft", "dense"):
            records.write_record(seed.record, arm.name, kept)
    # The record of the base is there; its run, whose cost is the budget of "sft", is not.
    assert [arm.name for arm in seed.arms_to_run([])] == ["base", "dense", "sft"]
    assert [arm.name for arm in seed.arms_to_run(["dense"])] == ["dense"]
    leave_run(seed.folder / "base", "1", "0")
    assert [arm.name for arm in seed.arms_to_run([])] == ["dense", "sft"]
    for name in ("sft", "dense"):
        records.write_record(seed.record, name, kept)
    assert seed.arms_to_run([]) == []


def test_a_scaling_curve_is_measured_kept_and_shown() -> None:
    """Of 400 positions as many are right at step k as 0.9 - 0.5 / sqrt(k) says."""
    run, steps = Path("run"), (2, 4, 8, 16, 32, 64, 128)
    leave_run(run, "1", "0")
    log = [{"step": step, "cost/flops": 1e9, "reward/mean": 0.5} for step in range(1, steps[-1] + 1)]
    (run / "steps.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in log))
    for step in steps:
        num_right = round(400 * (0.9 - 0.5 / step**0.5))
        positions = tuple(
            replace(
                FIRST,
                task_id=f"g{number:03}:9",
                doc_id=f"g{number}",
                reasoning_correct=number < num_right,
                ntp_correct=number < 40,
            )
            for number in range(400)
        )
        write_results(
            Results(positions=positions, policy_path="p", step=step),
            run / "validation" / f"step-{step:06d}.jsonl",
        )
    curve = scaling.measure_curve(run, about={"commands": ["rpt fit"], "seconds": 3})
    assert curve.steps == steps
    assert curve.flops == tuple(1e9 * step for step in steps)
    assert [rate.successes for rate in curve.rates("ntp")] == [40] * 7
    scaling.write_curve(Path("scaling-2.json"), curve)
    assert scaling.read_curves(Path()) == {2: curve}
    row = scaling.law_table({2: curve}).splitlines()[-1]
    assert "| 0.50 [" in row  # alpha
    assert "| 90.0 % [" in row  # P*
    assert "| power (" in row
    scaling.plot_laws({2: curve}, Path("scaling.png"))
    assert Path("scaling.png").stat().st_size > 5000


def leave_validation(folder: Path, step: int, reasoning: str, at_once: str) -> Path:
    """Three positions of a game with two places to find: the first cup told, untold, and the last cup."""
    kinds = (("first", 1), ("first", 0), ("last", 1))
    positions = tuple(
        replace(
            FIRST, task_id=f"g{number}:9", doc_id=f"g{number}",
            fields={"depth": 2, "place": place, "told": told},
            reasoning_correct=one == "1", ntp_correct=two == "1", length=20 * (step + 1) + number,
        )
        for number, ((place, told), one, two) in enumerate(zip(kinds, reasoning, at_once, strict=True))
    )  # fmt: skip
    path = folder / "validation" / f"step-{step:06d}.jsonl"
    write_results(Results(positions=positions, policy_path="p", step=step), path)
    return path


def test_a_case_is_kept_by_kind_of_position_and_shown_beside_what_was_expected() -> None:
    about = {"commands": ["rpt fit"], "commit": "abc", "seconds": 3}
    before, after = leave_validation(Path("b"), 0, "000", "010"), leave_validation(Path("a"), 1, "101", "000")
    kept = answers.measure_case(before, after, about=about)
    assert kept.groups == ("first, told", "first, untold", "last, told")
    assert kept.lengths == {"before": 21.0, "after": 41.0}
    assert str(kept.rate("before, at once", "first, untold")).endswith("1/1")
    for seed in (0, 1):
        answers.write_case(answers.record_path(seed), "masked-span", kept)
    assert answers.read_cases(answers.record_path(1)) == {"masked-span": kept}
    told, last, untold = answers.answers_table().splitlines()[2:]
    assert "above 90 %: only the text behind the span says it" in told
    assert "100.0 %, 100.0 %" in told
    assert "2/2" in told
    assert "+100.0" in told
    assert "21 -> 41" in last
    assert "12.5 % +- 6" in untold
    assert "0.0 %, 0.0 %" in untold


def test_validations_of_other_positions_are_not_compared() -> None:
    before, after = leave_validation(Path("b"), 0, "000", "010"), leave_run(Path("a"), "1011", "0000")
    with pytest.raises(AssertionError, match="different positions"):
        answers.measure_case(before, after / "validation" / "step-000002.jsonl", about={})


def test_every_case_has_a_family_and_its_own_folders() -> None:
    families = {family.name: family for family in cases.FAMILIES}
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {case.family for case in cases.CASES} == families.keys()
    seed = answers.AnswerSeed(2)
    for case in cases.CASES:
        prepare, validate, fit = seed.case_commands(case, families[case.family])
        assert f"tasks/evidence-answers-2-{case.name}" in prepare
        assert f"runs/evidence/answers-2/{case.name}-before" in validate
        assert f"runs/evidence/answers-2/{case.name}" in fit
        assert ("--source.source.noise" in prepare) == case.name.endswith("noise")
