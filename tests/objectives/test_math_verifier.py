"""Math-Verify in its own processes: answers written by hand, and failures."""

from __future__ import annotations

import subprocess
import threading

import pytest

from rpt_lightning.objectives.math.verifier import MathVerifier, _Worker
from rpt_lightning.objectives.rewards.answer import AnswerReward


@pytest.fixture
def verifier(answer_reward: AnswerReward) -> MathVerifier:
    return answer_reward.verifier


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty, 2)", r"\left(-\infty,2\right)"),
    (r"(3, \frac{\pi}{2})", r"\left(3,\frac{\pi}{2}\right)"),
    ("1000", "1,000"),
    ("033", "33"),
    ("5", "x=5"),
    ("4", " 4 "),
    ("4", r"4\text{ cm}"),
    (r"\text{Evelyn}", r"\text{Evelyn}"),
    ("4", r"\boxed{4}"),
    # Numbers as programs write them, on either side. Math-Verify alone reads the e as Euler's number.
    ("0.00001", "1e-05"),
    ("1e-05", r"10^{-5}"),
    ("1500", "1.5e3"),
    ("2e-1", "-1+2e"),
]
DIFFERENT = [
    (r"\frac{1}{2}", "0.51"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("[0,1)", "(0,1)"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    ("204", "20"),
    (r"\sqrt{2}", "1.4"),
    (r"\text{even}", r"\text{odd}"),
    ("4", "4, 5"),
    ("1e-05", "e-5"),
    ("2e-1", "0.2"),
]


def test_answers_written_by_hand(verifier: MathVerifier) -> None:
    found = verifier.verdicts(EQUAL + DIFFERENT)
    wanted = ["right"] * len(EQUAL) + ["wrong"] * len(DIFFERENT)
    assert dict(zip(EQUAL + DIFFERENT, found, strict=True)) == dict(
        zip(EQUAL + DIFFERENT, wanted, strict=True)
    )


def test_what_cannot_be_checked_has_a_verdict_of_its_own(verifier: MathVerifier) -> None:
    assert verifier.verdicts([("4", " ")]) == ["unreadable"]
    assert verifier.verdicts([(" ", "4")]) == ["error"]  # there is nothing to read in the true answer


def test_it_works_in_any_thread(verifier: MathVerifier) -> None:
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.extend(verifier.verdicts([("4", "4"), ("4", "5"), ("4", "4")]))
    )
    thread.start()
    thread.join()
    assert found == ["right", "wrong", "right"]


def test_a_prediction_that_computes_for_ever_is_ended_and_the_next_is_checked(verifier: MathVerifier) -> None:
    """The power is computed in C, where no Python signal arrives."""
    assert verifier.verdicts([("4", "9^{9^{9^9}}")]) == ["timeout"]
    assert verifier.verdicts([("4", "4")]) == ["right"]


def test_a_process_that_dies_is_an_error_and_is_replaced(verifier: MathVerifier) -> None:
    assert verifier.verdicts([("4", "4")]) == ["right"]
    process = process_of(verifier)
    process.terminate()  # ignored: signals are meant for the run
    assert verifier.verdicts([("4", "4")]) == ["right"]
    process.kill()
    process.wait()
    assert verifier.verdicts([("4", "4")]) == ["error"]
    assert verifier.verdicts([("4", "4")]) == ["right"]


def test_its_process_ends_when_nobody_asks_any_more(verifier: MathVerifier) -> None:
    """When the run ends, in whatever way, the kernel closes the process's pipe."""
    verifier.verdicts([("4", "4")])
    process = process_of(verifier)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    verifier._workers.get()  # other tests cannot use a worker with a closed pipe
    verifier._workers.put(_Worker(cpu_limit_s=1.0))


def process_of(verifier: MathVerifier) -> subprocess.Popen[str]:
    worker = verifier._workers.get()
    verifier._workers.put(worker)
    assert worker._process is not None
    return worker._process


def test_bad_settings_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cpu_limit_s=0"):
        MathVerifier(cpu_limit_s=0)
    monkeypatch.setattr("rpt_lightning.objectives.math.verifier.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'math-verify"):
        MathVerifier()
