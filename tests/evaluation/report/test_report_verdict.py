"""Statements about numbers: 40 documents of 5 positions each, with outcomes that are written down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rpt_lightning.evaluation.report.verdict import MIN_DOCUMENTS, MIN_POSITIONS, reward_ends, verdicts
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.records.results import Results
from sample_results import FIRST


def results(reasoning, ntp, *, step=0, num_documents=40, **fields):
    """Make a run.

    ``reasoning`` and ``ntp`` say how many of every document's 5 positions are right, or are functions of the
    document. If ``reasoning`` is None, reasoning was not measured.
    """

    def right(rule, document, position):
        return position < (rule(document) if callable(rule) else rule)

    positions = [
        replace(
            FIRST,
            task_id=f"{document}:{position}",
            doc_id=str(document),
            position=position,
            reasoning_correct=None if reasoning is None else right(reasoning, document, position),
            ntp_correct=right(ntp, document, position),
            **fields,
        )
        for document in range(num_documents)
        for position in range(5)
    ]
    return Results(positions=tuple(positions), policy_path="p", step=step)


def run(*validations, name="run", rewards=()):
    steps = {step: {"reward/mean": reward} for step, reward in enumerate(rewards, start=1)}
    return Run(name=name, steps=steps, validations={one.step: one for one in validations}, rollouts={})


def alternating(document):
    return 1 if document % 2 else 3


@pytest.mark.parametrize(
    ("reasoning", "ntp", "tone", "words", "numbers"),
    [
        (
            3,
            2,
            "gain",
            "Reasoning beats",
            "by reasoning 60.0 % [53.1, 66.5] 120/200, by NTP 40.0 % [33.5, 46.9] 80/200 at the same "
            "positions",
        ),
        (
            2,
            3,
            "loss",
            "Reasoning does not beat next-token prediction: it is worse",
            "Difference -20.0 points [-20.0, -20.0]",
        ),
        (2, 2, "undecided", "Reasoning is not shown to beat", "Difference +0.0 points [+0.0, +0.0]"),
        (
            alternating,
            2,
            "undecided",
            "the interval of the difference contains 0",
            "paired bootstrap over 40 documents",
        ),
    ],
)
def test_reasoning_against_ntp(reasoning, ntp, tone, words, numbers):
    (statement,) = verdicts([run(results(reasoning, ntp))])["run"]
    assert statement.tone == tone
    assert words in statement.headline
    assert numbers in statement.numbers


@pytest.mark.parametrize("num_documents", [MIN_DOCUMENTS - 1, 1])
def test_too_few_positions_are_not_judged(num_documents):
    """No claim is made, even if reasoning is right everywhere and NTP nowhere."""
    (statement,) = verdicts([run(results(5, 0, num_documents=num_documents))])["run"]
    assert statement.tone == "unknown"
    assert statement.headline.startswith(
        "Too few positions to say whether reasoning beats next-token prediction"
    )
    assert "100.0 %" in statement.numbers
    assert f"{MIN_POSITIONS} positions of {MIN_DOCUMENTS} documents" in statement.numbers


def test_what_was_not_measured_is_not_judged():
    (unvalidated,) = verdicts([run()])["run"]
    assert unvalidated.headline == "No held-out accuracy: this run was never validated."
    (ntp_only,) = verdicts([run(results(None, 2))])["run"]
    assert ntp_only.tone == "unknown"
    assert "40.0 % [33.5, 46.9] 80/200" in ntp_only.numbers


def test_the_thought_against_an_empty_one():
    _, thought = verdicts([run(results(3, 3, empty_thought_correct=False))])["run"]
    assert thought.tone == "gain"
    assert (
        "With the thought 60.0 % [53.1, 66.5] 120/200, with an empty one 0.0 % [0.0, 1.9] 0/200."
        in thought.numbers
    )
    _, thought = verdicts([run(results(3, 3, empty_thought_correct=True))])["run"]
    assert (thought.tone, thought.headline) == (
        "loss",
        "The thought harms: after an empty one the same weights answer better.",
    )


def test_what_training_changed():
    _, rose = verdicts([run(results(1, 2), results(2, 2, step=30), results(3, 2, step=50))])["run"]
    assert (rose.tone, rose.headline) == ("gain", "From step 0 to step 50 reasoning accuracy rose.")
    assert "At step 0 by reasoning 20.0 %" in rose.numbers
    assert (
        "Without reasoning, at the same positions: 40.0 % [33.5, 46.9] 80/200 at step 0, 40.0 %"
        in rose.numbers
    )
    _, fell = verdicts([run(results(3, 2), results(1, 2, step=50))])["run"]
    assert fell.tone == "loss"
    _, one_validation = verdicts([run(results(3, 2, step=50), rewards=[0.1] * 30)])["run"]
    assert one_validation.headline.startswith("The effect of training is unknown")
    _, changed = verdicts([run(results(1, 2), results(1, 2, step=3), rewards=[0.1, 0.2, 0.3])])["run"]
    assert changed.tone == "undecided"


def test_other_runs_are_held_against_the_first():
    rpt, ntp = run(results(3, 1), name="rpt"), run(results(None, 4, num_documents=40), name="ntp")
    said = verdicts([rpt, ntp])
    assert len(said["rpt"]) == 1
    own, without = said["ntp"][-2:]
    assert (own.tone, own.headline) == ("gain", "ntp by NTP is more accurate than rpt by reasoning.")
    assert "rpt by reasoning 60.0 % [53.1, 66.5] 120/200, ntp by NTP 80.0 %" in own.numbers
    assert (without.tone, without.headline) == ("gain", "ntp by NTP is more accurate than rpt by NTP.")
    assert "rpt by NTP 20.0 %" in without.numbers
    # By NTP both are the same, so the gain came from the way of answering.
    *_, own, without = verdicts([run(results(1, 4), name="rpt"), ntp])["ntp"]
    assert (own.tone, without.tone) == ("gain", "undecided")
    assert (
        len(verdicts([ntp, run(results(None, 4), name="other")])["other"]) == 2
    )  # of its own, and one by NTP
    other = verdicts([rpt, run(results(3, 1, num_documents=39), name="other")])["other"][-1]
    assert (other.tone, other.headline) == (
        "unknown",
        "It is not known whether other by NTP is better than rpt by NTP: the positions differ.",
    )
    assert "Validate both with the same task folder" in other.numbers
    assert "never validated" in verdicts([rpt, run(name="other")])["other"][-1].headline


def test_answers_to_questions_are_not_passed_over():
    (statement,) = verdicts([replace(run(), answers={0: None})])["run"]
    assert "was asked questions" in statement.headline
    assert "rpt compare" in statement.numbers


def test_reward_of_first_and_last_steps():
    assert (
        reward_ends(run(rewards=[0.0] * 10 + [0.5] * 5 + [1.0] * 10))
        == "0.000 in the first 10 steps, 1.000 in the last 10"
    )
    assert reward_ends(run(rewards=[0.25, 0.75])) == "0.500 in the first 2 steps, 0.500 in the last 2"
    assert reward_ends(run()) == "not logged"
