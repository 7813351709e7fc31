"""The wording of questions also appears in lm-eval's task files. Only this test keeps the two the same."""

from __future__ import annotations

from pathlib import Path

import yaml

from rpt_lightning.objectives.question_text import question_text
from rpt_lightning.types import Question

TASKS = Path(__file__).resolve().parents[2] / "scripts" / "lm_eval"


def test_lm_eval_asks_the_same_question() -> None:
    asked = yaml.safe_load((TASKS / "rpt_questions.yaml").read_text())["doc_to_text"]
    assert asked.replace("{{problem}}", "What is 2 + 2?") == question_text(
        Question(question_id="q-1", text="What is 2 + 2?", answer="4")
    )
    assert (
        yaml.safe_load((TASKS / "rpt_questions_direct.yaml").read_text())["include"] == "rpt_questions.yaml"
    )
